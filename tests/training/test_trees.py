"""Training with the questions of a page as branches of a tree."""

import numpy as np

from alignvlm_jax.training.trainer import _count_answers


def test_answers_are_counted_by_their_targets():
    rows = [
        [0, 0, 1, 1, 0, 0, 1, 1, 1, 0],  # two answers
        [1, 0, 0, 0, 1, 0, 0, 0, 0, 1],  # one answer at each end, and one of a single target
        [0] * 10,
    ]
    assert _count_answers(np.array([rows], np.float32)) == 5
