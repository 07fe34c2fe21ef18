"""What a search sees, how it is run, and what comes of it: numbers, no tensors."""
