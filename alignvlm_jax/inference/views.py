"""Several looks at one image, the page moved each time by a part of a patch. Not in the paper; off by default.

A patch that lies across two letters becomes a mixture of two words, and a mixture does not say which came first. Where
a letter falls on the grid of patches is chance: with the page moved by half a patch, one patch sees it whole where two
saw halves of it. The model is given K views beside each other, and all say one answer:

    y_t = argmax_y  1/K sum_k log p(y | view k, question, y_<t)

No weights are changed and none are added: it works with every checkpoint and every connector, and takes K times the
work of one view. `inference/generate.py` decodes.

The views lie evenly over one patch, around where the page is, so that none is moved by more than half a patch:

    K = 2: -1/4 and 1/4 of a patch to the right        K = 4: -1/4 and 1/4 to the right and down

Axes: K views.
"""

import math

import numpy as np
import PIL.Image
from jaxtyping import Float, Int

from alignvlm_jax.data.tiling import TilePlan


def offsets(number: int, plan: TilePlan, patch_size: int) -> Int[np.ndarray, "K 2"]:
    """How far each view is moved, right and down, in pixels of the image.

    K is laid out as columns x rows, as square as it can be with the more columns: 2 x 1, 3 x 1, 2 x 2, 5 x 1, 3 x 2.

    Args:
      number: K.
      plan: how the image is cut; its cells say how large a patch is on the image.
      patch_size: of the vision encoder, in pixels of a tile.
    """
    rows = max(divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0)
    y, x = np.meshgrid(_centred(rows), _centred(number // rows), indexing="ij")
    left, top, right, bottom = plan.boxes[plan.first_cell]
    height, width = plan.sizes[plan.first_cell]
    scale = np.array([(right - left) / width, (bottom - top) / height])  # pixels of the image to one of a tile
    return np.rint(np.stack([x.ravel(), y.ravel()], axis=1) * patch_size * scale).astype(int)


def _centred(number: int) -> Float[np.ndarray, " number"]:
    """Points evenly over [-1/2, 1/2], each in the middle of its part."""
    return (np.arange(number) + 0.5) / number - 0.5


def moved(image: PIL.Image.Image, right: int, down: int) -> PIL.Image.Image:
    """The image moved by so many pixels, in a frame that stays; what comes in at an edge repeats that edge."""
    columns = np.clip(np.arange(image.width) - right, 0, image.width - 1)
    rows = np.clip(np.arange(image.height) - down, 0, image.height - 1)
    return PIL.Image.fromarray(np.asarray(image)[rows][:, columns])
