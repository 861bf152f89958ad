"""The language-model loss from hidden states and the LM head, without the logits of all positions and words.

Axes: N positions, D width, V vocabulary, C positions in a chunk, K rows of the vocabulary in a block.

Only positions of non-zero weight (answers; a small part of a row) are computed: their indices come first in an order,
and are taken C at a time, as many chunks as there are, so shapes are static and nothing is dropped. A chunk passes over
the vocabulary as ALIGN does (`vocabulary_streaming.py`):

    weights   0 0 1 1 0 0 2 0     C = 2
    order     2 3 6 | 0 1 4 5 7
    chunk 0   2 3
    chunk 1   6 .                 "." has weight 0
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
      mesh_axes: which axes of the mesh in force cut the first axis of `hidden`, and which cut the vocabulary.

    Returns:
      (the sum, the sum of the weights), both float32, so that pieces of a batch can be added before the one division.
    """
    axes = streaming.resolve(mesh_axes, num_queries=hidden.shape[0], num_rows=head.shape[0])
    targets, weights = jnp.asarray(targets), jnp.asarray(jax.lax.stop_gradient(weights), jnp.float32)
    losses = _losses((z_loss, chunk_size, block_size, axes), hidden, head, targets, weights)
    return losses, jnp.sum(weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(options, hidden, head, targets, weights):
    return _forward(options, hidden, head, targets, weights)[0]


def _forward(options, hidden, head, targets, weights):
    """The loss, and the softmax of each position, for the backward pass."""
    z_loss, chunk_size, block_size, axes = options
    of_position, of_row = streaming.query_spec(axes), streaming.row_spec(axes)

    def local(hidden, head, targets, weights):
        chunks = _Chunks(hidden, head, targets, weights, chunk_size, block_size, axes.vocabulary)

        def score_chunk(index, carry):
            maximum, total, right = carry
            here, rows, targets, _ = chunks.take(index)

            def score(start, size, carry):
                running, right = carry
                logits, is_target = chunks.logits(rows, targets, start, size)
                return running.update(logits)[0], right + jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)

            empty = streaming.RunningSoftmax.empty(len(here)), jnp.zeros(here.shape)
            running, right_logits = chunks.over_vocabulary(score, empty)
            found = running.maximum, running.total, right_logits
            return tuple(
                of_all.at[here].set(of_chunk, mode="drop")
                for of_all, of_chunk in zip((maximum, total, right), found, strict=True)
            )

        # Positions without weight keep something finite.
        empty = jnp.zeros(chunks.num_positions), jnp.ones(chunks.num_positions), jnp.zeros(chunks.num_positions)
        maximum, total, right = jax.lax.fori_loop(0, chunks.count, score_chunk, empty)
        softmax, across = streaming.RunningSoftmax(maximum, total), axes.vocabulary
        softmax, sums = softmax.merge(softmax.shared_maximum(across), {}, {"right": right[:, None]}, across)
        log_total, right = jnp.log(softmax.total), sums["right"][:, 0]
        losses = softmax.maximum - right + log_total + z_loss * (softmax.maximum + log_total) ** 2
        return streaming.add_up(jnp.sum(chunks.weights * losses), axes.queries), softmax

    in_specs = (of_position, of_row, of_position, of_position)
    sharded = streaming.shard(local, axes, in_specs, (jax.P(), of_position))
    return sharded(hidden, head, targets, weights)


def _losses_forward(options, hidden, head, targets, weights):
    loss, softmax = _forward(options, hidden, head, targets, weights)
    return loss, (hidden, head, targets, weights, softmax)


def _losses_backward(options, saved, cotangent):
    z_loss, chunk_size, block_size, axes = options
    of_position, of_row = streaming.query_spec(axes), streaming.row_spec(axes)

    def local(hidden, head, targets, weights, softmax, cotangent):
        chunks = _Chunks(hidden, head, targets, weights, chunk_size, block_size, axes.vocabulary)

        def step(index, carry):
            of_hidden, of_head = carry
            here, rows, targets, weights = chunks.take(index)
            here_softmax = jax.tree.map(lambda leaf: leaf.at[here].get(mode="fill", fill_value=1.0), softmax)
            log_z = here_softmax.maximum + jnp.log(here_softmax.total)
            weights = weights * cotangent
            # d/dlogit of -log p(target) + z_loss log(Z)²: p (1 + 2 z_loss log Z), less 1 at the target.
            of_normalizer = weights * (1 + 2 * z_loss * log_z)

            def add(start, size, carry):
                of_rows, of_head = carry
                logits, is_target = chunks.logits(rows, targets, start, size)
                p = here_softmax.probabilities(logits)
                of_logits = p * of_normalizer[:, None] - jnp.where(is_target, weights[:, None], 0.0)
                of_logits = of_logits.astype(rows.dtype)
                block = streaming.take(head, start, size, rows.dtype)
                grown = streaming.take(of_head, start, size) + streaming.dot(of_logits.T, rows)
                return of_rows + streaming.dot(of_logits, block), streaming.put(of_head, start, grown)

            of_rows, of_head = chunks.over_vocabulary(add, (jnp.zeros(rows.shape), of_head))
            return of_hidden.at[here].set(of_rows, mode="drop"), of_head

        zeros = jnp.zeros((chunks.num_positions, hidden.shape[-1])), jnp.zeros(head.shape)
        of_hidden, of_head = jax.lax.fori_loop(0, chunks.count, step, zeros)
        of_hidden = streaming.add_up(of_hidden, axes.vocabulary).reshape(hidden.shape)
        of_head = streaming.add_up(of_head, axes.queries)
        return of_hidden.astype(hidden.dtype), of_head.astype(head.dtype)

    in_specs = (of_position, of_row, of_position, of_position, of_position, jax.P())
    sharded = streaming.shard(local, axes, in_specs, (of_position, of_row))
    return *sharded(*saved, cotangent), None, None


_losses.defvjp(_losses_forward, _losses_backward)


class _Chunks:
    """The weighted positions of one device, C at a time, and its rows of the head."""

    def __init__(self, hidden, head, targets, weights, chunk_size, block_size, across):
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.targets, self.weights = targets.reshape(-1), weights.reshape(-1)
        self.head, self.across = head, across
        self.num_positions = len(self.weights)
        smallest, largest = _CHUNK_SIZES
        self.size = min(chunk_size or min(largest, max(smallest, self.num_positions // 16)), self.num_positions)
        self.block_size = block_size or streaming.default_block_size(self.size)
        counted = self.weights != 0
        # How many chunks there are is known only when the program runs: the loops over them are while loops.
        self.count = (jnp.sum(counted) + self.size - 1) // self.size
        (order,) = jnp.nonzero(counted, size=self.num_positions, fill_value=self.num_positions)
        self.order = jnp.pad(order, (0, self.size), constant_values=self.num_positions)

    def take(self, index):
        """Positions of a chunk, their hidden states, targets and weights; N is the position of no weight."""
        here = jax.lax.dynamic_slice_in_dim(self.order, index * self.size, self.size)
        rows = self.hidden.at[here].get(mode="fill", fill_value=0)
        targets, weights = (leaf.at[here].get(mode="fill", fill_value=0) for leaf in (self.targets, self.weights))
        return here, rows, targets, weights

    def logits(self, rows, targets, start, size):
        """A block of a chunk's logits [C, K], and which of them is the target's."""
        block = streaming.take(self.head, start, size, rows.dtype)
        first = start + (jax.lax.axis_index(self.across) * self.head.shape[0] if self.across else 0)
        return streaming.dot(rows, block.T), targets[:, None] == first + jnp.arange(size)

    def over_vocabulary(self, step, carry):
        return streaming.stream(step, carry, num_rows=self.head.shape[0], block_size=self.block_size)
