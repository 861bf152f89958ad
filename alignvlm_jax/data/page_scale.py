"""The scale at which a model sees a page, and the scales of the pages that it was trained on.

A page of more pixels than its tiles can show is shrunk. At scale 0.5, letters are half as high as in the file. The
training records the scale that 95 % of a sample of its pages reach, and `inference/answers.py` warns about pages that
are shrunk much more.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignvlm_jax.data import images
from alignvlm_jax.data.conversations import encoded_images
from alignvlm_jax.data.tiling import TilePlan, TilingConfig, plan_tiles
from alignvlm_jax.errors import UserError

# Number of records that are sampled from each data set.
_SAMPLE_SIZE = 64
_PERCENTILE = 5


def page_scale(plan: TilePlan) -> float:
    """Returns the scale at which the cells show the page, at most 1: the root of the share of its pixels.

    Example: a page of 1000 x 2000 on two cells of 500 x 500 has a quarter of its pixels, and scale 0.5.
    """
    width, height = plan.image_size
    if plan.canvas is not None:
        shown = plan.canvas.size[0] * plan.canvas.size[1]
    else:
        cells = range(plan.first_cell, plan.first_cell + plan.grid[0] * plan.grid[1])
        # An enlarged cell shows no more detail than the page has.
        shown = sum(min(math.prod(plan.sizes[i]), _area(plan.boxes[i])) for i in cells)
    return min(1.0, math.sqrt(shown / (width * height)))


def _area(box: tuple[float, float, float, float]) -> float:
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


def sample_scale(sources: Sequence[Sequence[Mapping[str, Any]]], tiling: TilingConfig) -> float | None:
    """Returns the scale that 95 % of the pages in a sample of all data sets reach; None if there are no images.

    Only the headers of the images are read. Records that cannot be read are skipped, because the training reports them.
    """
    scales = []
    for records in sources:
        for index in np.unique(np.linspace(0, len(records) - 1, min(_SAMPLE_SIZE, len(records)), dtype=int)):
            try:
                scales += [
                    page_scale(plan_tiles(*images.image_size(data), tiling)) for data in encoded_images(records[index])
                ]
            except UserError:
                continue
    return float(np.percentile(scales, _PERCENTILE)) if scales else None
