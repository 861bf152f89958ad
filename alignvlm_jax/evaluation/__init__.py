"""Evaluation: exact match on documents with control images, and published benchmarks with their official metrics."""
