"""Trackers: where the curves of a run and its shown answers go. One module for each of TensorBoard, W&B and trackio."""
