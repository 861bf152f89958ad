"""Writes, verifies, finds and restores the checkpoints of a run."""
