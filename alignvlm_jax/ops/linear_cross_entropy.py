"""Language-model loss from hidden states and the LM head, without holding the logits of all positions and words.

Axes: N positions, D width, V vocabulary, C positions in a chunk, G chunks whose numbers are kept, K rows of the
vocabulary in a block, F full blocks, R rows in the smaller last block; t and f, as in `vocabulary_streaming.py`.

The loss is computed only where the weight is not zero: at the answers, a small part of a row. The positions are sorted
so that these come first, and then processed in chunks of C, up to the last chunk that contains one. This way shapes are
static, and no position is dropped:

    weights   0 0 1 1 0 0 2 0     C = 2
    order     2 3 6 0 1 4 5 7
    chunk 0   2 3
    chunk 1   6 0                 position 0 has weight 0

As in ALIGN (`vocabulary_streaming.py`), the loop over the chunks is inside the loop over the blocks of the vocabulary.
A block of a head that is split over devices is therefore gathered once, and devices may have different numbers of
chunks.

The gradients are computed together with the loss, as in Liger (Hsu et al., arXiv 2410.10989). The backward pass only
multiplies them by its cotangent. The gradient of a logit needs the softmax's normalizer, which is known after the last
block. Liger holds all logits of a chunk. Here, that would gather the head once for each chunk. Instead, one pass over
the vocabulary keeps exp(logit - maximum) in the dtype of the products, and a second pass turns these numbers into the
gradients. The loss takes one product of N V D multiply-adds, with one gradient two, and with both three.

The kept numbers may take 512 MiB, unless the caller allows more. For the 8B model on two devices along `tensor`, that
is enough for 4,000 answer tokens on a device; a bin has about 1,000. The logits of further chunks are computed again,
which is a fourth product for these. (Another two passes would not need it. But on TPUs, to gather the head and to sum
its gradient once more takes about as long, even for 8,000 positions.)
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.ops import vocabulary_streaming as streaming

_CHUNK_SIZES = (256, 2048)  # smallest and largest C
_KEPT_BYTES = 1 << 29


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
    kept_bytes: int = _KEPT_BYTES,
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
      kept_bytes: memory for the numbers that are kept until the gradients are computed.
      mesh_axes: axes of the current mesh that split the first axis of `hidden`, the vocabulary, and the head's width.

    Returns:
      The sum, and the sum of the weights, both float32. They are returned separately so that parts of a batch can be
      added before the single division.
    """
    axes = streaming.resolve(mesh_axes, num_queries=hidden.shape[0], num_rows=head.shape[0], widths=head.shape[1:])
    targets, weights = jnp.asarray(targets), jnp.asarray(jax.lax.stop_gradient(weights), jnp.float32)
    loss = _loss(_Options(z_loss, chunk_size, block_size, kept_bytes, axes), hidden, head, targets, weights)
    return loss, jnp.sum(weights)


@dataclasses.dataclass(frozen=True)
class _Options:
    """Static (hashable) options of the custom-VJP functions."""

    z_loss: float
    chunk_size: int | None
    block_size: int | None
    kept_bytes: int
    axes: streaming.VocabularyMesh


class _Gradients(NamedTuple):
    """Gradients of hidden states and head (None if not needed), or a flag for each of them (True if needed)."""

    hidden: Float[Array, "... D"] | bool | None
    head: Float[Array, "V D"] | bool | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options, hidden, head, targets, weights):
    return _loss_and_gradients(options, _Gradients(False, False), hidden, head, targets, weights)[0]


@ordinary_modes()
def _loss_forward(options, hidden, head, targets, weights):
    # With frozen weights, JAX asks for the gradient of one of the two only.
    needed = _Gradients(hidden.perturbed, head.perturbed)
    values = (argument.value for argument in (hidden, head, targets, weights))
    return _loss_and_gradients(options, needed, *values)


@ordinary_modes()
def _loss_backward(options, gradients, cotangent):
    del options
    # The loss is linear in its cotangent.
    return *jax.tree.map(lambda gradient: (gradient * cotangent).astype(gradient.dtype), gradients), None, None


_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)


def _loss_and_gradients(
    options: _Options,
    needed: _Gradients,
    hidden: Float[Array, "... D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "..."],
    weights: Float[Array, "..."],
) -> tuple[Float[Array, ""], _Gradients]:
    """Returns the loss, and those of its gradients that are needed."""
    axes = options.axes

    def local(hidden, head, targets, weights):
        head = streaming.Table(head, axes)
        chunks = _Chunks(hidden, targets, weights, options)
        kept = _Kept.empty(chunks, head.num_rows, options.kept_bytes) if any(needed) else None
        softmax, target_logits, kept = _score(chunks, head, kept)
        # log Z is maximum + log_total. The maximum minus the target's logit comes first: both may be large.
        log_total = jnp.log(softmax.total)
        log_z = softmax.maximum + log_total
        losses = softmax.maximum - target_logits + log_total + options.z_loss * log_z**2
        loss = streaming.all_reduce(jnp.sum(chunks.weights * losses), axes.queries)
        if kept is None:
            return loss, _Gradients(None, None)
        # d/dlogit of -log p(target) + z_loss log(Z)²: p (1 + 2 z_loss log Z), minus 1 at the target. The difference at
        # the target is taken in float32, because p may be close to 1.
        dlog_z = chunks.weights * (1 + 2 * options.z_loss * log_z)
        dtarget = dlog_z * jnp.exp(target_logits - softmax.maximum) / softmax.total - chunks.weights
        dhidden, dhead = _differentiate(chunks, head, kept, (softmax, dlog_z, dtarget), needed)
        # Sum over devices: the gradient of a position over those that share the vocabulary, the gradient of a row of
        # the head over those that share the positions. `update_gradient` has summed over those that share its columns.
        if needed.hidden:
            dhidden = streaming.all_reduce(dhidden, axes.vocabulary).astype(hidden.dtype)
            dhidden = chunks.restore_order(dhidden).reshape(hidden.shape)
        if needed.head:
            dhead = streaming.all_reduce_gradient(dhead, axes.queries_only).astype(head.part.dtype)
        return loss, _Gradients(dhidden, dhead)

    position_spec, table_spec = streaming.query_spec(axes), streaming.table_spec(axes)
    in_specs = (position_spec, table_spec, position_spec, position_spec)
    out_specs = _Gradients(position_spec if needed.hidden else None, table_spec if needed.head else None)
    sharded = streaming.shard(local, axes, in_specs, (jax.P(), out_specs))
    return sharded(hidden, head, targets, weights)


def _score(
    chunks: "_Chunks", head: streaming.Table, kept: "_Kept | None"
) -> tuple[streaming.RunningSoftmax, Float[Array, " slots"], "_Kept | None"]:
    """Passes over the vocabulary once; returns each position's softmax and logit of the target, and fills `kept`."""

    def score_block(start, size, carry):
        block = head.read_block(start, size, chunks.hidden.dtype)

        def score(chunk, carry, *, is_kept):
            sums, kept = carry
            running, target_logits = chunks.slice(sums, chunk)
            logits = chunks.logits(chunk, block)
            # Exactly one block of one device contains the target, so this sum is its logit.
            is_target = chunks.is_target(chunk, _first_row(head) + start, size)
            target_logits += jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
            running, exponentials, _ = running.update(logits)
            if is_kept:
                kept = kept.store(start, chunk, running.maximum, exponentials)
            return chunks.update(sums, chunk, (running, target_logits)), kept

        return chunks.loop(score, carry, num_kept=kept.num_chunks if kept else 0)

    empty = streaming.RunningSoftmax.empty(chunks.num_slots), jnp.zeros(chunks.num_slots)
    (softmax, target_logits), kept = chunks.over_vocabulary(head, score_block, (empty, kept))
    # Chunks without weight were skipped. Give them finite values, because 0 * inf would be NaN.
    is_computed = jnp.arange(chunks.num_slots) < chunks.count * chunks.size
    softmax = streaming.RunningSoftmax(
        jnp.where(is_computed, softmax.maximum, 0.0), jnp.where(is_computed, softmax.total, 1.0)
    )
    # Merge over the devices that share the vocabulary. Only one of them has the target's row, and the others have
    # summed zeros.
    axis_names = head.axes.vocabulary
    maximum = softmax.shared_maximum(axis_names)
    softmax, sums = softmax.merge(maximum, {}, {"target": target_logits[:, None]}, axis_names)
    return softmax, sums["target"][:, 0], kept


def _differentiate(
    chunks: "_Chunks",
    head: streaming.Table,
    kept: "_Kept",
    scalars: tuple[streaming.RunningSoftmax, Float[Array, " slots"], Float[Array, " slots"]],
    needed: _Gradients,
) -> _Gradients:
    """Passes over the vocabulary once more; returns the gradients from this device's positions and rows, in float32.

    Args:
      chunks: the positions.
      head: the head.
      kept: the numbers that the first pass has kept.
      scalars: softmax of each position, and the gradients of its log(Z) and of its target's logit.
      needed: gradients to compute.
    """
    dtype = chunks.hidden.dtype
    # The block is read for the gradient of the hidden states, and for logits that are computed again.
    reads_blocks = needed.hidden or kept.num_chunks < chunks.max_count

    def add_block(start, size, carry):
        dhidden, dhead = carry
        block = head.read_block(start, size, dtype) if reads_blocks else None

        def add(chunk, carry, *, is_kept):
            dhidden, dblock = carry
            softmax, dlog_z, dtarget = chunks.slice(scalars, chunk)
            if is_kept:
                maximum, exponentials = kept.load(start, size, chunk)
                p = exponentials * (jnp.exp(maximum - softmax.maximum) / softmax.total)[:, None]
            else:
                p = softmax.probabilities(chunks.logits(chunk, block))
            is_target = chunks.is_target(chunk, _first_row(head) + start, size)
            # Round the gradient of the logits to the dtype of the products.
            dlogits = jnp.where(is_target, dtarget[:, None], p * dlog_z[:, None]).astype(dtype)
            if needed.hidden:
                rows = chunks.slice(dhidden, chunk) + streaming.dot(dlogits, block)
                dhidden = chunks.update(dhidden, chunk, rows)
            if needed.head:
                dblock += streaming.dot(dlogits.T, chunks.slice(chunks.hidden, chunk))
            return dhidden, dblock

        dblock = jnp.zeros((size, head.width)) if needed.head else None
        dhidden, dblock = chunks.loop(add, (dhidden, dblock), num_kept=kept.num_chunks)
        return dhidden, head.update_gradient(dhead, start, dblock) if needed.head else None

    dhidden = jnp.zeros(chunks.hidden.shape) if needed.hidden else None
    dhead = jnp.zeros(head.part.shape) if needed.head else None
    return _Gradients(*chunks.over_vocabulary(head, add_block, (dhidden, dhead)))


class _Chunks:
    """Positions of one device in chunks of C, those with a weight first.

    Attributes:
      hidden: hidden states in the order of the chunks, padded to full chunks.
      targets: targets, in the same order.
      weights: weights, in the same order.
      size: C.
      count: number of chunks that contain a weight. It depends on the data, so loops over the chunks are while loops.
      max_count: number of all chunks.
      num_slots: number of positions in all chunks.
      block_size: K.
    """

    def __init__(
        self, hidden: Float[Array, "... D"], targets: Int[Array, "..."], weights: Float[Array, "..."], options: _Options
    ):
        hidden, targets, weights = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1)
        num_positions = len(weights)
        smallest, largest = _CHUNK_SIZES
        self.size = min(options.chunk_size or min(largest, max(smallest, num_positions // 16)), num_positions)
        self.max_count = -(-num_positions // self.size)
        self.num_slots = self.max_count * self.size
        self.block_size = options.block_size or streaming.default_block_size(self.size)
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

    def logits(self, chunk: Array, block: Float[Array, "K D"]) -> Float[Array, "C K"]:
        """Returns the logits of a chunk for a block of words."""
        return streaming.dot(self.slice(self.hidden, chunk), block.T)

    def is_target(self, chunk: Array, first_word: Array | int, num_words: int) -> Bool[Array, "C K"]:
        """Returns which words of a block are the targets of a chunk."""
        return self.slice(self.targets, chunk)[:, None] == first_word + jnp.arange(num_words)

    def loop(self, step, carry, *, num_kept: int):
        """Folds `carry = step(chunk, carry, is_kept=)` over the chunks that contain a weight; the first G are kept."""
        num_kept = min(num_kept, self.max_count)
        last = jnp.minimum(self.count, num_kept)
        if num_kept:
            with jax.named_scope("kept"):
                carry = jax.lax.fori_loop(0, last, functools.partial(step, is_kept=True), carry)
        if num_kept < self.max_count:
            with jax.named_scope("not_kept"):
                carry = jax.lax.fori_loop(last, self.count, functools.partial(step, is_kept=False), carry)
        return carry

    def over_vocabulary(self, head: streaming.Table, step, carry):
        """Folds `carry = step(start, size, carry)` over the blocks of the head."""
        return streaming.stream(step, carry, num_rows=head.num_rows, block_size=self.block_size)


@flax.struct.dataclass
class _Kept:
    """Numbers of a pass over the vocabulary from which the gradients are computed.

    exp(logit - maximum) keeps its relative precision when it is rounded, which a logit does not.

    Attributes:
      blocks: exp(logit - maximum) of full blocks, in the dtype of the products.
      last: the same of the smaller last block.
      maxima: the maximum to which the numbers of a block are relative, the largest logit so far.
    """

    blocks: Float[Array, "F G C K"]
    last: Float[Array, "G C R"]
    maxima: Float[Array, "F+1 G C"]

    @classmethod
    def empty(cls, chunks: _Chunks, num_rows: int, max_bytes: int) -> "_Kept":
        """Returns the arrays before the pass, for as many chunks as `max_bytes` hold."""
        full, ragged = divmod(num_rows, chunks.block_size)
        dtype = chunks.hidden.dtype
        num_chunks = min(chunks.max_count, max_bytes // (chunks.size * num_rows * dtype.itemsize))
        return cls(
            jnp.zeros((full, num_chunks, chunks.size, chunks.block_size), dtype),
            jnp.zeros((num_chunks, chunks.size, ragged), dtype),
            jnp.zeros((full + 1, num_chunks, chunks.size)),
        )

    @property
    def num_chunks(self) -> int:
        """G."""
        return self.last.shape[0]

    def store(
        self, start: Array | int, chunk: Array, maximum: Float[Array, " C"], exponentials: Float[Array, "C K"]
    ) -> "_Kept":
        """Returns the arrays with the numbers of a chunk and a block, which starts at row `start`."""
        block_size = self.blocks.shape[-1]
        index = start // block_size
        maxima = jax.lax.dynamic_update_slice(self.maxima, maximum[None, None], (index, chunk, 0))
        exponentials = exponentials.astype(self.blocks.dtype)
        if exponentials.shape[-1] < block_size:
            last = jax.lax.dynamic_update_slice(self.last, exponentials[None], (chunk, 0, 0))
            return self.replace(last=last, maxima=maxima)
        blocks = jax.lax.dynamic_update_slice(self.blocks, exponentials[None, None], (index, chunk, 0, 0))
        return self.replace(blocks=blocks, maxima=maxima)

    def load(self, start: Array | int, size: int, chunk: Array) -> tuple[Float[Array, " C"], Float[Array, "C K"]]:
        """Returns the numbers of a chunk and a block: its maximum and exp(logit - maximum), both float32."""
        chunk_size, block_size = self.blocks.shape[-2:]
        index = start // block_size
        maximum = jax.lax.dynamic_slice(self.maxima, (index, chunk, 0), (1, 1, chunk_size))[0, 0]
        if size < block_size:
            exponentials = jax.lax.dynamic_slice(self.last, (chunk, 0, 0), (1, chunk_size, size))[0]
        else:
            exponentials = jax.lax.dynamic_slice(self.blocks, (index, chunk, 0, 0), (1, 1, chunk_size, size))[0, 0]
        return maximum, exponentials.astype(jnp.float32)


def _first_row(head: streaming.Table) -> Array | int:
    """Returns the word id of this device's first row."""
    axis_names = head.axes.vocabulary
    return jax.lax.axis_index(axis_names) * head.num_rows if axis_names else 0
