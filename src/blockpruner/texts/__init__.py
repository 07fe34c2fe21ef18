"""Text, and questions with answers, as examples for a model."""
