"""Import of checkpoints from Hugging Face folders, and export to them."""
