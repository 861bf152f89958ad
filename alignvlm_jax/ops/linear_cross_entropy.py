"""Language-model loss from hidden states and the LM head, without holding the logits of all positions and words.

Axes: N positions, D width, V vocabulary, C positions in a chunk, G chunks in a group, M = G C, K rows of the
vocabulary in a block, F full blocks, R rows in the smaller last block.

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

The gradients are computed together with the loss, as in Liger (Hsu et al., arXiv 2410.10989): the backward pass only
multiplies them by its cotangent. The gradient of a logit needs the softmax's normalizer, which is known after the last
block. So one pass over the vocabulary keeps exp(logit - maximum) in the dtype of the products, and a second pass turns
these numbers into the gradients. The loss with both gradients takes three products of N V D multiply-adds, with one
gradient two, and without gradients one.

What is kept is large for a row full of answers. Both passes therefore process a group of M positions at a time, as many
as 512 MiB hold. If the width of the head is split, another group gathers the head and sums its gradient over devices
once more. For the 8B model on two devices along `tensor`, M is 4,000 positions, and a bin has about 1,000 answers.
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
_GROUP_BYTES = 1 << 29  # memory for the numbers that are kept


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
    group_size: int | None = None,
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
      group_size: M, rounded down to whole chunks; None means as many as 512 MiB hold.
      mesh_axes: axes of the current mesh that split the first axis of `hidden`, the vocabulary, and the head's width.

    Returns:
      The sum, and the sum of the weights, both float32. They are returned separately so that parts of a batch can be
      added before the single division.
    """
    axes = streaming.resolve(mesh_axes, num_queries=hidden.shape[0], num_rows=head.shape[0], widths=head.shape[1:])
    targets, weights = jnp.asarray(targets), jnp.asarray(jax.lax.stop_gradient(weights), jnp.float32)
    loss = _loss(_Options(z_loss, chunk_size, block_size, group_size, axes), hidden, head, targets, weights)
    return loss, jnp.sum(weights)


@dataclasses.dataclass(frozen=True)
class _Options:
    """Static (hashable) options of the custom-VJP functions."""

    z_loss: float
    chunk_size: int | None
    block_size: int | None
    group_size: int | None
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
        positions = _Positions(hidden, targets, weights, options, keeps_rows=head.num_rows if any(needed) else 0)

        def add_group(index, carry):
            loss, gradients = carry
            group = positions.group(index)
            group_loss, dhidden, dhead = _group_loss(group, head, options, needed, gradients.head)
            if needed.hidden:
                dhidden = streaming.update_block(gradients.hidden, index * positions.group_size, dhidden)
            return loss + group_loss, _Gradients(dhidden, dhead)

        empty = _Gradients(
            jnp.zeros_like(positions.hidden) if needed.hidden else None,
            jnp.zeros(head.part.shape) if needed.head else None,
        )
        if positions.max_groups == 1:
            loss, gradients = add_group(0, (0.0, empty))
        else:
            # Groups gather blocks of the head, so all devices must process the same number of them.
            num_groups = jax.lax.pmax(positions.num_groups, axes.queries) if axes.queries else positions.num_groups
            with jax.named_scope("groups"):
                loss, gradients = jax.lax.fori_loop(0, num_groups, add_group, (jnp.zeros(()), empty))

        loss = streaming.all_reduce(loss, axes.queries)
        dhidden, dhead = gradients
        if needed.hidden:
            dhidden = positions.restore_order(dhidden).reshape(hidden.shape)
        if needed.head:
            # A row of the head is shared by devices with other positions. Those that share only its columns have been
            # added to it already.
            dhead = streaming.all_reduce_gradient(dhead, axes.queries_only).astype(head.part.dtype)
        return loss, _Gradients(dhidden, dhead)

    position_spec, table_spec = streaming.query_spec(axes), streaming.table_spec(axes)
    in_specs = (position_spec, table_spec, position_spec, position_spec)
    out_specs = _Gradients(position_spec if needed.hidden else None, table_spec if needed.head else None)
    sharded = streaming.shard(local, axes, in_specs, (jax.P(), out_specs))
    return sharded(hidden, head, targets, weights)


def _group_loss(
    group: "_Group",
    head: streaming.Table,
    options: _Options,
    needed: _Gradients,
    dhead: Float[Array, "V/t D/f"] | None,
) -> tuple[Float[Array, ""], Float[Array, "M D"] | None, Float[Array, "V/t D/f"] | None]:
    """Returns the loss of a group, the gradient of its hidden states, and `dhead` plus its gradient of the head."""
    block_size = options.block_size or streaming.default_block_size(group.chunk_size)
    kept = _Kept.empty(group, head.num_rows, block_size) if any(needed) else None
    softmax, target_logits, kept = _score(group, head, kept, block_size)
    # log Z is maximum + log_total. The maximum minus the target's logit comes first: both may be large.
    log_total = jnp.log(softmax.total)
    log_z = softmax.maximum + log_total
    losses = softmax.maximum - target_logits + log_total + options.z_loss * log_z**2
    loss = jnp.sum(group.weights * losses)
    if kept is None:
        return loss, None, None
    # d/dlogit of -log p(target) + z_loss log(Z)²: p (1 + 2 z_loss log Z), minus 1 at the target. The difference at the
    # target is taken in float32, because p may be close to 1.
    dlog_z = group.weights * (1 + 2 * options.z_loss * log_z)
    dtarget = dlog_z * jnp.exp(target_logits - softmax.maximum) / softmax.total - group.weights
    return loss, *_differentiate(group, head, kept, (softmax, dlog_z, dtarget), block_size, needed, dhead)


def _score(
    group: "_Group", head: streaming.Table, kept: "_Kept | None", block_size: int
) -> tuple[streaming.RunningSoftmax, Float[Array, " M"], "_Kept | None"]:
    """Passes over the vocabulary once; returns each position's softmax and logit of the target, and fills `kept`."""

    def score_block(start, size, carry):
        block = head.read_block(start, size, group.hidden.dtype)

        def score(chunk, carry):
            sums, kept = carry
            running, target_logits = group.slice(sums, chunk)
            logits = streaming.dot(group.slice(group.hidden, chunk), block.T)
            # Exactly one block of one device contains the target, so this sum is its logit.
            is_target = group.is_target(chunk, _first_row(head) + start, size)
            target_logits += jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
            running, exponentials, _ = running.update(logits)
            if kept is not None:
                kept = kept.store(start, chunk, running.maximum, exponentials)
            return group.update(sums, chunk, (running, target_logits)), kept

        return jax.lax.fori_loop(0, group.num_chunks, score, carry)

    num_positions = len(group.weights)
    empty = streaming.RunningSoftmax.empty(num_positions), jnp.zeros(num_positions)
    (softmax, target_logits), kept = streaming.stream(
        score_block, (empty, kept), num_rows=head.num_rows, block_size=block_size
    )
    # Chunks without weight were skipped. Give them finite values, because 0 * inf would be NaN.
    is_computed = jnp.arange(num_positions) < group.num_chunks * group.chunk_size
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
    group: "_Group",
    head: streaming.Table,
    kept: "_Kept",
    scalars: tuple[streaming.RunningSoftmax, Float[Array, " M"], Float[Array, " M"]],
    block_size: int,
    needed: _Gradients,
    dhead: Float[Array, "V/t D/f"] | None,
) -> _Gradients:
    """Returns the gradients of a group's loss; that of the head is added to `dhead`.

    Args:
      group: the positions.
      head: the head.
      kept: result of the pass over the vocabulary.
      scalars: softmax of each position, and the gradients of its log(Z) and of its target's logit.
      block_size: K.
      needed: gradients to compute.
      dhead: gradient of the head of earlier groups.
    """
    dtype = group.hidden.dtype

    def add_block(start, size, carry):
        dhidden, dhead = carry
        block = head.read_block(start, size, dtype) if needed.hidden else None

        def add(chunk, carry):
            dhidden, dblock = carry
            softmax, dlog_z, dtarget = group.slice(scalars, chunk)
            maximum, exponentials = kept.load(start, size, chunk)
            scale = dlog_z * jnp.exp(maximum - softmax.maximum) / softmax.total
            is_target = group.is_target(chunk, _first_row(head) + start, size)
            dlogits = jnp.where(is_target, dtarget[:, None], exponentials * scale[:, None]).astype(dtype)
            if needed.hidden:
                rows = group.slice(dhidden, chunk) + streaming.dot(dlogits, block)
                dhidden = group.update(dhidden, chunk, rows)
            if needed.head:
                dblock += streaming.dot(dlogits.T, group.slice(group.hidden, chunk))
            return dhidden, dblock

        dblock = jnp.zeros((size, head.width)) if needed.head else None
        dhidden, dblock = jax.lax.fori_loop(0, group.num_chunks, add, (dhidden, dblock))
        return dhidden, head.add_gradient(dhead, start, dblock) if needed.head else None

    dhidden = jnp.zeros(group.hidden.shape) if needed.hidden else None
    dhidden, dhead = streaming.stream(add_block, (dhidden, dhead), num_rows=head.num_rows, block_size=block_size)
    if needed.hidden:
        dhidden = streaming.all_reduce(dhidden, head.axes.vocabulary).astype(dtype)
    return _Gradients(dhidden, dhead)


class _Positions:
    """Positions of one device in groups of chunks, those with a weight first.

    Attributes:
      hidden: hidden states in this order, padded to full groups.
      group_size: M.
      max_groups: number of groups of all positions.
      num_groups: number of groups that contain a weight.
    """

    def __init__(
        self,
        hidden: Float[Array, "... D"],
        targets: Int[Array, "..."],
        weights: Float[Array, "..."],
        options: _Options,
        *,
        keeps_rows: int,
    ):
        """Sorts the positions.

        Args:
          hidden: hidden states.
          targets: ids of the correct words.
          weights: weights of the positions.
          options: options of the loss.
          keeps_rows: number of words for which a number is kept at each position; 0 for a single group.
        """
        hidden, targets, weights = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1)
        num_positions = len(weights)
        smallest, largest = _CHUNK_SIZES
        self._chunk_size = min(options.chunk_size or min(largest, max(smallest, num_positions // 16)), num_positions)
        max_chunks = group_chunks = -(-num_positions // self._chunk_size)
        if keeps_rows:
            size = options.group_size or _GROUP_BYTES // (keeps_rows * hidden.dtype.itemsize)
            group_chunks = min(max_chunks, max(1, size // self._chunk_size))
        self.group_size = group_chunks * self._chunk_size
        self.max_groups = -(-max_chunks // group_chunks)
        # Number of chunks and groups with a weight, rounded up. They depend on the data, so loops over them are while
        # loops.
        self._num_chunks = -(-jnp.sum(weights != 0) // self._chunk_size)
        self.num_groups = -(-self._num_chunks // group_chunks)
        # False (has a weight) sorts before True.
        self._order = jnp.argsort(weights == 0, stable=True)
        self.hidden, self._targets, self._weights = map(self._in_order, (hidden, targets, weights))

    def _in_order(self, leaf: Array) -> Array:
        padding = self.max_groups * self.group_size - leaf.shape[0]
        return jnp.pad(leaf[self._order], ((0, padding), *((0, 0),) * (leaf.ndim - 1)))

    def group(self, index: Array | int) -> "_Group":
        """Returns a group."""
        start = index * self.group_size
        hidden, targets, weights = (
            streaming.slice_block(leaf, start, self.group_size) for leaf in (self.hidden, self._targets, self._weights)
        )
        num_chunks = jnp.clip(self._num_chunks - start // self._chunk_size, 0, self.group_size // self._chunk_size)
        return _Group(hidden, targets, weights, num_chunks, self._chunk_size)

    def restore_order(self, leaf: Array) -> Array:
        """Returns an array with a row for each position, in the original order, [N, ...]."""
        return (
            jnp.zeros_like(leaf, shape=(len(self._order), *leaf.shape[1:]))
            .at[self._order]
            .set(leaf[: len(self._order)], unique_indices=True)
        )


@dataclasses.dataclass(frozen=True)
class _Group:
    """Positions of one device that are processed together, in chunks of C.

    Attributes:
      hidden: hidden states.
      targets: ids of the correct words.
      weights: weights.
      num_chunks: number of chunks that contain a weight.
      chunk_size: C.
    """

    hidden: Float[Array, "M D"]
    targets: Int[Array, " M"]
    weights: Float[Array, " M"]
    num_chunks: Int[Array, ""]
    chunk_size: int

    def slice(self, tree, chunk: Array):
        """Returns a chunk's part of each array of a tree."""
        return jax.tree.map(lambda leaf: streaming.slice_block(leaf, chunk * self.chunk_size, self.chunk_size), tree)

    def update(self, tree, chunk: Array, parts):
        """Returns the tree with a chunk's part of each array replaced."""
        return jax.tree.map(lambda leaf, part: streaming.update_block(leaf, chunk * self.chunk_size, part), tree, parts)

    def is_target(self, chunk: Array, first_word: Array | int, num_words: int) -> Bool[Array, "C K"]:
        """Returns which words of a block are the targets of a chunk."""
        return self.slice(self.targets, chunk)[:, None] == first_word + jnp.arange(num_words)


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
    def empty(cls, group: _Group, num_rows: int, block_size: int) -> "_Kept":
        """Returns the arrays before the pass."""
        full, ragged = divmod(num_rows, block_size)
        chunks = len(group.weights) // group.chunk_size, group.chunk_size
        dtype = group.hidden.dtype
        return cls(
            jnp.zeros((full, *chunks, block_size), dtype),
            jnp.zeros((*chunks, ragged), dtype),
            jnp.zeros((full + 1, *chunks)),
        )

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
