"""What a model is worth: quality now; speed, memory and reasons have their files here too."""
