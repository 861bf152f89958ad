"""The folder of a run, and everything about the arrays in it: written, sealed, found, restored."""
