"""Scores: what the model gets right, and what it would get right without looking."""
