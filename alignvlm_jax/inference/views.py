"""Several views of one image, shifted by parts of a patch. Not in the paper, and off by default.

A patch that covers parts of two letters becomes a mixture of two words, and a mixture does not tell which letter comes
first. The position of a letter on the grid of patches is arbitrary: if the page is shifted by half a patch, a letter
that was split between two patches can be inside one. The model reads K views in parallel, and all of them give one
answer:

    y_t = argmax_y  1/K sum_k log p(y | view k, question, y_<t)

No weights are changed or added. Views work with every checkpoint and every connector, and take K times the work of a
single view. `inference/generate.py` decodes them.

The shifts are spread evenly over one patch around the original position, so none is larger than half a patch:

    K = 2: -1/4 and 1/4 of a patch to the right        K = 4: -1/4 and 1/4 to the right and down

Axes: K views.
"""

import math

import numpy as np
import PIL.Image
from jaxtyping import Float, Int

from alignvlm_jax.data.tiling import TilePlan


def offsets(number: int, plan: TilePlan, patch_size: int) -> Int[np.ndarray, "K 2"]:
    """Returns the shift of each view, right and down, in pixels of the image.

    The K shifts form a grid of columns x rows that is as square as possible, with at least as many columns as rows:
    2 x 1, 3 x 1, 2 x 2, 5 x 1, 3 x 2.

    Args:
      number: number of views K.
      plan: tiles of the image; they determine the size of a patch on the image.
      patch_size: patch size of the vision encoder, in pixels of a tile.
    """
    rows = max(divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0)
    # The shifts in parts of a patch become pixels of a tile, and then pixels of the image, rounded to integers.
    y, x = np.meshgrid(_centered(rows), _centered(number // rows), indexing="ij")
    left, top, right, bottom = plan.boxes[plan.first_cell]
    height, width = plan.sizes[plan.first_cell]
    scale = np.array([(right - left) / width, (bottom - top) / height])  # Pixels of the image per pixel of a tile.
    return np.rint(np.stack([x.ravel(), y.ravel()], axis=1) * patch_size * scale).astype(int)


def _centered(number: int) -> Float[np.ndarray, " number"]:
    """Returns the midpoints of `number` equal parts of [-1/2, 1/2]."""
    return (np.arange(number) + 0.5) / number - 0.5


def shift(image: PIL.Image.Image, right: int, down: int) -> PIL.Image.Image:
    """Returns the image shifted by a number of pixels within its frame. The edges are repeated."""
    # Gathering clipped source indices repeats the edge, and avoids resampling.
    columns = np.clip(np.arange(image.width) - right, 0, image.width - 1)
    rows = np.clip(np.arange(image.height) - down, 0, image.height - 1)
    return PIL.Image.fromarray(np.asarray(image)[rows][:, columns])
