"""Robustness to noise: Gaussian noise on the vision features, as in the paper, and corruptions of the page itself."""
