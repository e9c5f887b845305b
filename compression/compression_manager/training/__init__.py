"""The training loop: its events and their order, and what a resume needs."""
