"""Checkpoints in from Hugging Face and out to it."""
