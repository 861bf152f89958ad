"""Trains models: the step, the optimizer, the stages, and the loop that runs them."""
