"""What criteria are made of: the stream, gradients, gates, rankings."""
