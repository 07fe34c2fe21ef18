"""What a model is worth: quality on text, tasks and in its own words; speed, memory, and why blocks went."""
