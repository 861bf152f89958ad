"""From a checkpoint and an image to words."""
