"""Language-model loss from hidden states and the LM head, without holding the logits of all positions and words.

Axes: N positions, D width, V vocabulary, C positions in a chunk, K rows of the vocabulary in a block.

The loss is computed only where the weight is not zero: at the answers, a small part of a row. The positions are sorted
so that these come first, and then processed in chunks of C, up to the last chunk that contains one. This way shapes are
static, and no position is dropped:

    weights   0 0 1 1 0 0 2 0     C = 2
    order     2 3 6 0 1 4 5 7
    chunk 0   2 3
    chunk 1   6 0                 position 0 has weight 0

As in ALIGN (`vocabulary_streaming.py`), there is a single pass over the vocabulary; the loop over the chunks is inside
the loop over its blocks. A block of a head that is split over devices is therefore gathered once, and devices may have
different numbers of chunks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.ops import vocabulary_streaming as streaming

_CHUNK_SIZES = (256, 2048)  # smallest and largest C


@ordinary_modes()
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
    """Returns the sum over positions of weight * (-log p(target) + z_loss * log(Z)²), with Z the sum of exp(logits).

    The second term is the z-loss of PaLM (Chowdhery et al., arXiv 2204.02311, section 5).

    Args:
      hidden: hidden states of any leading shape; products are computed in their dtype, sums in float32.
      head: a row for each word, cast to the dtype of `hidden` one block at a time.
      targets: ids of the correct words, in [0, V) wherever the weight is not zero.
      weights: weights of the positions; no gradient flows through them.
      z_loss: cost of a log(Z) far from 0; PaLM uses 1e-4.
      chunk_size: C; None means a sixteenth of the positions, but at least 256 and at most 2048.
      block_size: K; None means `default_block_size`.
      mesh_axes: axes of the current mesh that split the first axis of `hidden`, the vocabulary, and the head's width.

    Returns:
      The sum, and the sum of the weights, both float32. They are returned separately so that parts of a batch can be
      added before the single division.
    """
    axes = streaming.resolve(mesh_axes, num_queries=hidden.shape[0], num_rows=head.shape[0], widths=head.shape[1:])
    targets, weights = jnp.asarray(targets), jnp.asarray(jax.lax.stop_gradient(weights), jnp.float32)
    loss = _loss(_Options(z_loss, chunk_size, block_size, axes), hidden, head, targets, weights)
    return loss, jnp.sum(weights)


@dataclasses.dataclass(frozen=True)
class _Options:
    """Static (hashable) options of the custom-VJP functions."""

    z_loss: float
    chunk_size: int | None
    block_size: int | None
    axes: streaming.VocabularyMesh


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options, hidden, head, targets, weights):
    return _forward(options, hidden, head, targets, weights)[0]


def _forward(
    options: _Options,
    hidden: Float[Array, "... D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "..."],
    weights: Float[Array, "..."],
) -> tuple[Float[Array, ""], streaming.RunningSoftmax]:
    """Returns the loss, and for the backward pass the softmax of each position in the order of the chunks."""
    axes = options.axes

    def local(hidden, head, targets, weights):
        head = streaming.Table(head, axes)
        chunks = _Chunks(hidden, targets, weights, options)

        def score_block(start, size, carry):
            block = head.read_block(start, size, hidden.dtype)

            def score(chunk, carry):
                running, target_logits = chunks.slice(carry, chunk)
                logits, is_target = chunks.logits(chunk, block, _first_row(head) + start)
                # Exactly one block of one device contains the target, so this sum is its logit.
                target_logits += jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
                return chunks.update(carry, chunk, (running.update(logits)[0], target_logits))

            return jax.lax.fori_loop(0, chunks.count, score, carry)

        # One pass over the vocabulary: softmax and logit of the target at each position.
        empty = streaming.RunningSoftmax.empty(chunks.num_slots), jnp.zeros(chunks.num_slots)
        softmax, target_logits = chunks.over_vocabulary(head, score_block, empty)
        # Chunks without weight were skipped. Give them finite values, because 0 * inf would be NaN below.
        is_computed = jnp.arange(chunks.num_slots) < chunks.count * chunks.size
        softmax = streaming.RunningSoftmax(
            jnp.where(is_computed, softmax.maximum, 0.0), jnp.where(is_computed, softmax.total, 1.0)
        )
        # Merge over the devices that share the vocabulary. Only one of them has the target's row, and the others have
        # summed zeros.
        softmax, sums = softmax.merge(
            softmax.shared_maximum(axes.vocabulary), {}, {"target": target_logits[:, None]}, axes.vocabulary
        )
        log_total, target_logits = jnp.log(softmax.total), sums["target"][:, 0]
        # log Z is maximum + log_total. The maximum minus the target's logit comes first: both may be large.
        losses = softmax.maximum - target_logits + log_total + options.z_loss * (softmax.maximum + log_total) ** 2
        return streaming.all_reduce(jnp.sum(chunks.weights * losses), axes.queries), softmax

    position_spec = streaming.query_spec(axes)
    in_specs = (position_spec, streaming.table_spec(axes), position_spec, position_spec)
    sharded = streaming.shard(local, axes, in_specs, (jax.P(), position_spec))
    return sharded(hidden, head, targets, weights)


@ordinary_modes()
def _loss_forward(options, hidden, head, targets, weights):
    loss, softmax = _forward(options, hidden, head, targets, weights)
    return loss, (hidden, head, targets, weights, softmax)


@ordinary_modes()
def _loss_backward(options, residuals, cotangent):
    axes = options.axes

    def local(hidden, head, targets, weights, softmax, cotangent):
        head = streaming.Table(head, axes)
        chunks = _Chunks(hidden, targets, weights, options)
        weights = chunks.weights * cotangent
        # d/dlogit of -log p(target) + z_loss log(Z)²: p (1 + 2 z_loss log Z), minus 1 at the target.
        dlog_z = weights * (1 + 2 * options.z_loss * (softmax.maximum + jnp.log(softmax.total)))
        scalars = softmax, weights, dlog_z

        def add_block(start, size, carry):
            dhidden, dhead = carry
            block = head.read_block(start, size, hidden.dtype)

            def add(chunk, carry):
                dhidden, dblock = carry
                softmax, weights, dlog_z = chunks.slice(scalars, chunk)
                logits, is_target = chunks.logits(chunk, block, _first_row(head) + start)
                # Recompute the probabilities, and round the gradient of the logits once, to the dtype of the products.
                dlogits = softmax.probabilities(logits) * dlog_z[:, None]
                dlogits = (dlogits - jnp.where(is_target, weights[:, None], 0.0)).astype(hidden.dtype)
                drows = chunks.slice(dhidden, chunk) + streaming.dot(dlogits, block)
                dblock += streaming.dot(dlogits.T, chunks.slice(chunks.hidden, chunk))
                return chunks.update(dhidden, chunk, drows), dblock

            dhidden, dblock = jax.lax.fori_loop(0, chunks.count, add, (dhidden, jnp.zeros(block.shape)))
            return dhidden, head.update_gradient(dhead, start, dblock)

        zeros = jnp.zeros(chunks.hidden.shape), jnp.zeros(head.part.shape)
        dhidden, dhead = chunks.over_vocabulary(head, add_block, zeros)
        # Sum over devices: the gradient of a position over those that share the vocabulary, the gradient of a row of
        # the head over those that share the positions. `update_gradient` has summed over those that share its columns.
        dhidden = streaming.all_reduce(dhidden, axes.vocabulary)
        dhead = streaming.all_reduce(dhead, axes.queries_only).astype(head.part.dtype)
        return chunks.restore_order(dhidden.astype(hidden.dtype)).reshape(hidden.shape), dhead

    position_spec, table_spec = streaming.query_spec(axes), streaming.table_spec(axes)
    in_specs = (position_spec, table_spec, position_spec, position_spec, position_spec, jax.P())
    sharded = streaming.shard(local, axes, in_specs, (position_spec, table_spec))
    return *sharded(*residuals, cotangent), None, None


_loss.defvjp(_loss_forward, _loss_backward)


class _Chunks:
    """Positions of one device in chunks of C, those with a weight first.

    Attributes:
      hidden: hidden states in the order of the chunks, padded to full chunks.
      targets: targets, in the same order.
      weights: weights, in the same order.
      size: C.
      count: number of chunks that contain a weight. It depends on the data, so loops over the chunks are while loops.
      num_slots: number of positions in all chunks.
    """

    def __init__(
        self, hidden: Float[Array, "... D"], targets: Int[Array, "..."], weights: Float[Array, "..."], options: _Options
    ):
        hidden, targets, weights = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1)
        num_positions = len(weights)
        smallest, largest = _CHUNK_SIZES
        self.size = min(options.chunk_size or min(largest, max(smallest, num_positions // 16)), num_positions)
        self.num_slots = -(-num_positions // self.size) * self.size
        self._block_size = options.block_size or streaming.default_block_size(self.size)
        # False (has a weight) sorts before True.
        self._order = jnp.argsort(weights == 0, stable=True)
        # Number of chunks with a weight, rounded up.
        self.count = (jnp.sum(weights != 0) + self.size - 1) // self.size
        self.hidden, self.targets, self.weights = map(self._in_chunk_order, (hidden, targets, weights))

    def _in_chunk_order(self, leaf: Array) -> Array:
        padding = self.num_slots - leaf.shape[0]
        return jnp.pad(leaf[self._order], ((0, padding), *((0, 0),) * (leaf.ndim - 1)))

    def restore_order(self, leaf: Array) -> Array:
        """Returns an array [num_slots, ...] in the original order of the positions, [N, ...]."""
        return (
            jnp.zeros_like(leaf, shape=(len(self._order), *leaf.shape[1:]))
            .at[self._order]
            .set(leaf[: len(self._order)], unique_indices=True)
        )

    def slice(self, tree, chunk: Array):
        """Returns a chunk's part of each array of a tree."""
        return jax.tree.map(lambda leaf: streaming.slice_block(leaf, chunk * self.size, self.size), tree)

    def update(self, tree, chunk: Array, parts):
        """Returns the tree with a chunk's part of each array replaced."""
        return jax.tree.map(lambda leaf, part: streaming.update_block(leaf, chunk * self.size, part), tree, parts)

    def logits(
        self, chunk: Array, block: Float[Array, "K D"], first_word: Array | int
    ) -> tuple[Float[Array, "C K"], Bool[Array, "C K"]]:
        """Returns the logits of a chunk for a block of words, and which of them belong to the targets.

        Args:
          chunk: index of the chunk.
          block: rows of the head.
          first_word: id of the first word of the block.
        """
        rows, targets = self.slice((self.hidden, self.targets), chunk)
        return streaming.dot(rows, block.T), targets[:, None] == first_word + jnp.arange(block.shape[0])

    def over_vocabulary(self, head: streaming.Table, step, carry):
        """Folds `carry = step(start, size, carry)` over the blocks of the head."""
        return streaming.stream(step, carry, num_rows=head.num_rows, block_size=self._block_size)


def _first_row(head: streaming.Table) -> Array | int:
    """Returns the word id of this device's first row."""
    axis_names = head.axes.vocabulary
    return jax.lax.axis_index(axis_names) * head.num_rows if axis_names else 0
