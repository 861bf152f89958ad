"""Attention of rows that share a page: each attends to the page and to its own positions, with one softmax over both.

Axes: P pages, Q branches of a page, R = P Q rows (the branches of a page are adjacent), L query positions, N slots of a
page, K own slots of a row, H query heads, G key-value heads, m = H / G, h head width.

The page's keys are stored once for its Q branches, and are not copied for the product either: the queries of all
branches and of the m heads of a group are the rows of one matrix.

    scores of the page   [P, G, Q m L, h] x [P, G, h, N]
    own scores           [P, Q, G, m L, h] x [P, Q, G, h, K]
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from alignvlm_jax.jax_modes import ordinary_modes

_MASKED = -1e30  # finite: if every key of a query is masked, -inf would give NaN
_SCORE_BYTES = 256 << 20  # Scores that are held at a time.
_MAX_BLOCKS = 16  # The blocks are unrolled, and more of them would take long to compile.


@ordinary_modes()
def page_attention(
    query: Float[Array, "R L H h"],
    page: tuple[Float[Array, "P G h N"], Float[Array, "P G N h"]],
    own: tuple[Float[Array, "R G h K"], Float[Array, "R G K h"]],
    *,
    page_visible: Bool[Array, "P N"],
    visible: Bool[Array, "R L K"],
) -> Float[Array, "R L H h"]:
    """Attends to the slots of a page and to the slots of each row.

    Args:
      query: queries of the new positions.
      page: keys and values of the pages, with the axes of `KVCache`.
      own: keys and values of the rows' own slots.
      page_visible: slots of a page that all of its branches attend to.
      visible: own slots that each position attends to.

    Returns:
      The attended values, in the dtype of the values.
    """
    rows, length, num_heads, width = query.shape
    (page_key, page_value), (key, value) = page, own
    pages, groups, _, page_slots = page_key.shape
    branches, repeats, slots = rows // pages, num_heads // groups, key.shape[3]
    query = query.reshape(pages, branches, length, groups, repeats, width) * width**-0.5
    key, value = (array.reshape(pages, branches, *array.shape[1:]) for array in own)
    visible = jnp.broadcast_to(visible, (rows, length, slots)).reshape(pages, branches, 1, 1, length, slots)

    def attend(block, allowed):
        size = block.shape[2]
        # Scores of the page: [P, G, Q m l, N], with its axes in the order of [P, G, Q, m, l].
        per_page = block.transpose(0, 3, 1, 4, 2, 5).reshape(pages, groups, branches * repeats * size, width)
        page_scores = jnp.einsum("pgih,pghn->pgin", per_page, page_key, preferred_element_type=jnp.float32)
        page_scores = jnp.where(page_visible[:, None, None], page_scores, _MASKED)
        # Own scores: [P, Q, G, m l, K].
        per_row = block.transpose(0, 1, 3, 4, 2, 5).reshape(pages, branches, groups, repeats * size, width)
        own_scores = jnp.einsum("pqgih,pqghk->pqgik", per_row, key, preferred_element_type=jnp.float32)
        own_scores = own_scores.reshape(pages, branches, groups, repeats, size, slots)
        own_scores = jnp.where(allowed, own_scores, _MASKED).reshape(pages, branches, groups, repeats * size, slots)

        def by_row(numbers):  # [P, G, Q m l, x] -> [P, Q, G, m l, x]
            numbers = numbers.reshape(pages, groups, branches, repeats * size, -1)
            return numbers.swapaxes(1, 2)

        def by_page(numbers):  # [P, Q, G, m l, x] -> [P, G, Q m l, x]
            return numbers.swapaxes(1, 2).reshape(pages, groups, branches * repeats * size, -1)

        # One softmax over both sets of keys: with a common maximum, the sums and the mixtures add up.
        top = jnp.maximum(
            by_row(jnp.max(page_scores, axis=-1, keepdims=True)), jnp.max(own_scores, axis=-1, keepdims=True)
        )
        page_weights, own_weights = jnp.exp(page_scores - by_page(top)), jnp.exp(own_scores - top)
        total = by_row(jnp.sum(page_weights, axis=-1, keepdims=True)) + jnp.sum(own_weights, axis=-1, keepdims=True)
        mixed = by_row(_mix("pgin,pgnh->pgih", page_weights, page_value))
        mixed += _mix("pqgik,pqgkh->pqgih", own_weights, value)
        out = (mixed / total).astype(value.dtype).reshape(pages, branches, groups, repeats, size, width)
        return out.transpose(0, 1, 4, 2, 3, 5)  # [P, Q, l, G, m, h]

    size = _block_size(length, 4 * rows * num_heads * (page_slots + slots))
    blocks = [
        attend(query[:, :, start : start + size], visible[..., start : start + size, :])
        for start in range(0, length, size)
    ]
    out = jnp.concatenate(blocks, axis=2) if len(blocks) > 1 else blocks[0]
    return out.reshape(rows, length, num_heads, width)


def _mix(product: str, weights, values):
    return jnp.einsum(product, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)


def _block_size(length: int, bytes_per_position: int) -> int:
    """Returns the number of query positions in a block."""
    size = max(1, _SCORE_BYTES // bytes_per_position, -(-length // _MAX_BLOCKS))
    return min(length, size)
