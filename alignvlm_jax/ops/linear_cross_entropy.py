"""The language-model loss from hidden states and the LM head, without the logits of all positions and words.

Axes: N positions, D width, V vocabulary, C positions in a chunk, K rows of the vocabulary in a block.

Only positions of non-zero weight (answers; a small part of a row) are computed. Positions are put in an order in which
those come first, and are taken C at a time, as many chunks as hold one, so shapes are static and nothing is dropped:

    weights   0 0 1 1 0 0 2 0     C = 2
    order     2 3 6 0 1 4 5 7
    chunk 0   2 3
    chunk 1   6 0                 0 has weight 0

The vocabulary is passed over once, as ALIGN does (`vocabulary_streaming.py`), and the chunks at each of its blocks: a
block of a head that is spread over devices is gathered once, and devices may have different numbers of chunks.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignvlm_jax.ops import vocabulary_streaming as streaming

_CHUNK_SIZES = (256, 2048)


def linear_cross_entropy(
    hidden: Float[Array, "... D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "..."],
    weights: Float[Array, "..."],
    *,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    block_size: int | None = None,
    mesh_axes: streaming.VocabularyMesh = streaming.UNSHARDED,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum over positions of weight * (-log p(target) + z_loss * log(Z)²), Z the sum of exp(logits).

    The second term is the z-loss of PaLM (Chowdhery et al., arXiv 2204.02311, section 5).

    Args:
      hidden: of any leading shape; products are computed in their dtype, sums in float32.
      head: a row for each word, cast to the dtype of `hidden` a block at a time.
      targets: the right words, in [0, V) wherever the weight is not zero.
      weights: of the positions; no gradient flows through them.
      z_loss: how much a log(Z) far from 0 costs; PaLM takes 1e-4.
      chunk_size: C; None means a sixteenth of the positions, but at least 256 and at most 2048.
      block_size: K; None means `default_block_size`.
      mesh_axes: which axes of the mesh in force cut the first axis of `hidden`, the vocabulary, and the head's width.

    Returns:
      (the sum, the sum of the weights), both float32, so that pieces of a batch can be added before the one division.
    """
    axes = streaming.resolve(mesh_axes, num_queries=hidden.shape[0], num_rows=head.shape[0], widths=head.shape[1:])
    targets, weights = jnp.asarray(targets), jnp.asarray(jax.lax.stop_gradient(weights), jnp.float32)
    losses = _losses((z_loss, chunk_size, block_size, axes), hidden, head, targets, weights)
    return losses, jnp.sum(weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(options, hidden, head, targets, weights):
    return _forward(options, hidden, head, targets, weights)[0]


def _forward(options, hidden, head, targets, weights):
    """The loss, and the softmax of each position in the chunks' order, for the backward pass."""
    z_loss, chunk_size, block_size, axes = options
    of_position = streaming.query_spec(axes)

    def local(hidden, head, targets, weights):
        head = streaming.Table(head, axes)
        chunks = _Chunks(hidden, targets, weights, chunk_size, block_size)

        def score_block(start, size, carry):
            block = head.take(start, size, hidden.dtype)

            def score(chunk, carry):
                running, right = chunks.take(carry, chunk)
                logits, is_target = chunks.logits(chunk, block, _first_row(head) + start)
                right += jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
                return chunks.put(carry, chunk, (running.update(logits)[0], right))

            return jax.lax.fori_loop(0, chunks.count, score, carry)

        empty = streaming.RunningSoftmax.empty(chunks.num_slots), jnp.zeros(chunks.num_slots)
        softmax, right = chunks.over_vocabulary(head, score_block, empty)
        # Chunks without weight were not computed: they keep something finite.
        seen = jnp.arange(chunks.num_slots) < chunks.count * chunks.size
        softmax = streaming.RunningSoftmax(jnp.where(seen, softmax.maximum, 0.0), jnp.where(seen, softmax.total, 1.0))
        across = axes.vocabulary
        softmax, sums = softmax.merge(softmax.shared_maximum(across), {}, {"right": right[:, None]}, across)
        log_total, right = jnp.log(softmax.total), sums["right"][:, 0]
        losses = softmax.maximum - right + log_total + z_loss * (softmax.maximum + log_total) ** 2
        return streaming.add_up(jnp.sum(chunks.weights * losses), axes.queries), softmax

    in_specs = (of_position, streaming.table_spec(axes), of_position, of_position)
    sharded = streaming.shard(local, axes, in_specs, (jax.P(), of_position))
    return sharded(hidden, head, targets, weights)


def _losses_forward(options, hidden, head, targets, weights):
    loss, softmax = _forward(options, hidden, head, targets, weights)
    return loss, (hidden, head, targets, weights, softmax)


def _losses_backward(options, saved, cotangent):
    z_loss, chunk_size, block_size, axes = options
    of_position, of_table = streaming.query_spec(axes), streaming.table_spec(axes)

    def local(hidden, head, targets, weights, softmax, cotangent):
        head = streaming.Table(head, axes)
        chunks = _Chunks(hidden, targets, weights, chunk_size, block_size)
        weights = chunks.weights * cotangent
        # d/dlogit of -log p(target) + z_loss log(Z)²: p (1 + 2 z_loss log Z), less 1 at the target.
        of_normalizer = weights * (1 + 2 * z_loss * (softmax.maximum + jnp.log(softmax.total)))
        scalars = softmax, weights, of_normalizer

        def add_block(start, size, carry):
            of_hidden, of_head = carry
            block = head.take(start, size, hidden.dtype)

            def add(chunk, carry):
                of_hidden, of_block = carry
                softmax, weights, of_normalizer = chunks.take(scalars, chunk)
                logits, is_target = chunks.logits(chunk, block, _first_row(head) + start)
                of_logits = softmax.probabilities(logits) * of_normalizer[:, None]
                of_logits = (of_logits - jnp.where(is_target, weights[:, None], 0.0)).astype(hidden.dtype)
                of_rows = chunks.take(of_hidden, chunk) + streaming.dot(of_logits, block)
                of_block += streaming.dot(of_logits.T, chunks.take(chunks.hidden, chunk))
                return chunks.put(of_hidden, chunk, of_rows), of_block

            of_hidden, of_block = jax.lax.fori_loop(0, chunks.count, add, (of_hidden, jnp.zeros(block.shape)))
            return of_hidden, head.put_gradient(of_head, start, of_block)

        zeros = jnp.zeros(chunks.hidden.shape), jnp.zeros(head.part.shape)
        of_hidden, of_head = chunks.over_vocabulary(head, add_block, zeros)
        of_hidden = streaming.add_up(of_hidden, axes.vocabulary)
        of_head = streaming.add_up(of_head, axes.queries_only).astype(head.part.dtype)
        return chunks.in_old_order(of_hidden.astype(hidden.dtype)).reshape(hidden.shape), of_head

    in_specs = (of_position, of_table, of_position, of_position, of_position, jax.P())
    sharded = streaming.shard(local, axes, in_specs, (of_position, of_table))
    return *sharded(*saved, cotangent), None, None


_losses.defvjp(_losses_forward, _losses_backward)


class _Chunks:
    """The positions of one device, those with weight first, C at a time.

    Attributes:
      hidden, targets, weights: in that order, filled up to whole chunks.
      size: C.
      count: how many chunks hold a weight; known only when the program runs, so loops over them are while loops.
      num_slots: positions in all chunks.
    """

    def __init__(self, hidden, targets, weights, chunk_size, block_size):
        hidden, targets, weights = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1)
        num_positions = len(weights)
        smallest, largest = _CHUNK_SIZES
        self.size = min(chunk_size or min(largest, max(smallest, num_positions // 16)), num_positions)
        self.num_slots = -(-num_positions // self.size) * self.size
        self._block_size = block_size or streaming.default_block_size(self.size)
        self._order = jnp.argsort(weights == 0, stable=True)
        self.count = (jnp.sum(weights != 0) + self.size - 1) // self.size
        self.hidden, self.targets, self.weights = map(self._in_order, (hidden, targets, weights))

    def _in_order(self, leaf):
        padding = self.num_slots - leaf.shape[0]
        return jnp.pad(leaf[self._order], ((0, padding), *((0, 0),) * (leaf.ndim - 1)))

    def in_old_order(self, leaf):
        """Undoes the order of an array [N, ...]."""
        return jnp.zeros_like(leaf, shape=(len(self._order), *leaf.shape[1:])).at[self._order].set(
            leaf[: len(self._order)], unique_indices=True
        )

    def take(self, tree, chunk):
        """A chunk's part of each array of a tree."""
        return jax.tree.map(lambda leaf: streaming.take(leaf, chunk * self.size, self.size), tree)

    def put(self, tree, chunk, parts):
        """The tree with a chunk's part of each array replaced."""
        return jax.tree.map(lambda leaf, part: streaming.put(leaf, chunk * self.size, part), tree, parts)

    def logits(self, chunk, block, first):
        """A chunk's logits of a block of words [C, K], of which the first has the number `first`; and which of them
        is the target's."""
        rows, targets = self.take((self.hidden, self.targets), chunk)
        return streaming.dot(rows, block.T), targets[:, None] == first + jnp.arange(block.shape[0])

    def over_vocabulary(self, head, step, carry):
        return streaming.stream(step, carry, num_rows=head.num_rows, block_size=self._block_size)


def _first_row(head: streaming.Table) -> Array | int:
    """The number of this device's first row."""
    across = head.axes.vocabulary
    return jax.lax.axis_index(across) * head.num_rows if across else 0
