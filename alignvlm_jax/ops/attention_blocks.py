"""The blocks of scores that the segments of packed rows need. Attention kernels skip the others.

Axes: B rows, L positions, n blocks per row, i blocks of queries, j blocks of keys.

Example: a row of two segments and padding in six blocks. The causal kernel runs the blocks marked `x`. Without segments
it would run all 21 blocks on and below the diagonal.

    segments in the block   key block
                            0 1 2 3 4 5
    query block 0   1       x . . . . .
                1   1       x x . . . .
                2   1, 2    x x x . . .
                3   2       . . x x . .
                4   2, 0    . . x x x .
                5   0       . . . . . .
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

_RESIDUES = 128
_NO_ID = np.iinfo(np.int32).max


def needed_blocks(segment_ids: Int[Array, "B L"], block: int, *, causal: bool) -> Bool[Array, "B n n"]:
    """Returns whether a query of block i may attend to a key of block j.

    Two blocks interact if they share a segment. Padding needs no block. The result is exact if the segments of a row
    have ascending ids, or ids below 128 in any order. Otherwise it may contain blocks that are not needed.

    Args:
      segment_ids: segment of each position; padding is 0 or negative. A segment may consist of several pieces.
      block: number of positions in a block, a divisor of L.
      causal: whether a position attends only to itself and earlier positions.
    """
    ids = segment_ids.reshape(segment_ids.shape[0], -1, block)
    is_real = ids > 0
    # The ranges of the blocks' ids overlap. If the ids ascend, then overlapping ranges share an id.
    lowest = jnp.min(jnp.where(is_real, ids, _NO_ID), axis=2)
    highest = jnp.max(jnp.where(is_real, ids, 0), axis=2)
    needed = (lowest[:, :, None] <= highest[:, None, :]) & (lowest[:, None, :] <= highest[:, :, None])
    # For other orders: the blocks share an id modulo 128. [B, n, 128], then [B, n, n].
    residues = jnp.any(is_real[..., None] & (ids[..., None] % _RESIDUES == jnp.arange(_RESIDUES)), axis=2)
    needed &= jnp.any(residues[:, :, None] & residues[:, None, :], axis=3)
    return needed & jnp.tri(needed.shape[1], dtype=bool) if causal else needed


def next_needed(needed: Bool[Array, "*b n"]) -> Int[Array, "*b n"]:
    """Returns for each step along the last axis the first needed step from there on.

    After the last needed step this is the last one, and 0 if no step is needed. A pipeline that loads the data of these
    steps loads data early where it skips steps, and never loads data that no step needs.
    """
    steps = jnp.arange(needed.shape[-1])
    upcoming = jax.lax.cummin(jnp.where(needed, steps, needed.shape[-1]), axis=needed.ndim - 1, reverse=True)
    return jnp.minimum(upcoming, jnp.max(jnp.where(needed, steps, 0), axis=-1, keepdims=True))
