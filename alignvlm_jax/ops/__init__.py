"""Numerics shared by the models: attention and the language-model loss."""
