"""Blocks taken out, for a while or for good, and checkpoints of what is left."""
