"""What a training run leaves behind: recorded in its checkpoints, read again, and shown."""
