"""Training: the step, the optimizer, the stages, checkpoints and the loop that runs them."""
