"""What is put in gaps, or made of other weights: in closed form, or trained."""
