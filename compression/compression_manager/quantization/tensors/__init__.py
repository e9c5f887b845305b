"""What is known of a tensor besides its values: whether it changed, how it lies in memory."""
