"""Inference: loading a checkpoint, answering questions about images, and pruning the vocabulary."""
