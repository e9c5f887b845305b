"""What the user's loop owns: optimizers, schedulers, data loaders and their batches."""
