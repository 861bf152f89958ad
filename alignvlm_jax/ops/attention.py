"""Attention over packed rows, and over a key-value cache.

Axes: B rows, L query positions, K key positions, H query heads, G key-value heads, R = H / G, h head width.

Five kernels compute the same values up to rounding. None of them holds an [L, L] array for all heads. All support
segments, so several examples can be packed into a row:

    "splash"   TPUs. A Pallas kernel, in `attention_splash.py`, which skips blocks above the diagonal, blocks between
               segments, and blocks of padding.
    "tokamax"  NVIDIA GPUs of the Hopper generation. Kernels of the package tokamax, in `attention_tokamax.py`.
    "flash"    NVIDIA GPUs from Ampere on. A Pallas (Triton) kernel, in `attention_flash.py`, which JAX deprecates.
               (`jax.nn.dot_product_attention` supports no segments, only a mask of L x L.)
    "cpu"      CPUs. Loops over pairs of blocks, in `attention_cpu.py`, which skip pairs that share no segment.
    "xla"      All devices, including older GPUs. In this file. Queries are processed in blocks, and the backward pass
               recomputes the scores of a block, so the scores of one block are held at a time. A causal block never
               reads the keys after it.

`default_kernel` chooses the kernel of a device, among those that are installed. Shapes that a kernel does not support
(such as a head width) fall back to the next kernel of the device, with a warning.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.ops import (
    attention_branches,
    attention_cpu,
    attention_flash,
    attention_splash,
    attention_tokamax,
)
from alignvlm_jax.ops.checkpoint_names import ATTENTION_OUT

KERNELS = ("splash", "tokamax", "flash", "cpu", "xla")

_MASKED = -1e30  # finite: if every key of a query is masked, -inf would give NaN
_QUERY_BLOCK = 64
_MAX_BLOCKS = 32  # the blocks are unrolled, and more of them would take long to compile
_GPUS = ("gpu", "cuda")
_AMPERE, _HOPPER, _BLACKWELL = 8.0, 9.0, 10.0  # compute capabilities

_MODULES = {"splash": attention_splash, "tokamax": attention_tokamax, "flash": attention_flash}
# The kernels that are tried for a choice, in this order. "xla" is the last one of all.
_CANDIDATES = {"splash": ("splash",), "tokamax": ("tokamax", "flash"), "flash": ("flash",), "xla": ()}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class AttentionMesh:
    """Names of the mesh axes that split rows and heads.

    XLA cannot partition a Pallas kernel. Instead, each device calls it on its own rows and heads. Axes that the current
    mesh lacks, or that do not divide the size they should split, have no effect.

    Attributes:
      rows: axes that split the rows.
      heads: axes that split the heads.
    """

    rows: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


def default_kernel(device: jax.Device) -> str:
    """Returns the fastest kernel that runs on a device, and logs the choice for a TPU or GPU."""
    if device.platform == "tpu":
        return _log_choice("splash", device)
    if device.platform not in _GPUS:
        return "cpu" if device.platform == "cpu" else "xla"
    # tokamax also has kernels for Blackwell, but its version for Python 3.11 has none for gradients of heads above 64.
    candidates = ["tokamax"] if _HOPPER <= _compute_capability(device) < _BLACKWELL else []
    candidates += ["flash"] if has_bfloat16(device) else []
    missing = []
    for kernel in candidates:
        reason = _MODULES[kernel].unavailable()
        if reason is None:
            return _log_choice(kernel, device, missing)
        missing.append(reason)
    return _log_choice("xla", device, missing)


def has_bfloat16(device: jax.Device) -> bool:
    """Returns whether a device multiplies bfloat16 matrices fast: a TPU, or an NVIDIA GPU from Ampere on."""
    return device.platform == "tpu" or (device.platform in _GPUS and _compute_capability(device) >= _AMPERE)


def _compute_capability(device: jax.Device) -> float:
    return float(getattr(device, "compute_capability", 0) or 0)  # AMD reports none


@ordinary_modes()
def packed_attention(
    query: Float[Array, "B L H h"],
    key: Float[Array, "B L G h"],
    value: Float[Array, "B L G h"],
    *,
    segment_ids: Int[Array, "B L"] | None = None,
    branch_ids: Int[Array, "B L"] | None = None,
    branch_tokens: int | None = None,
    causal: bool,
    kernel: str = "xla",
    mesh_axes: AttentionMesh = AttentionMesh(),
) -> Float[Array, "B L H h"]:
    """Attends within each segment of a row, and only to earlier positions if `causal`.

    Example: a row with two segments and one padding position, causal. `x` marks the keys that a query attends to. A
    kernel may skip the last one:

        segment_ids   1 1 2 2 0
        query 0       x . . . .
        query 1       x x . . .
        query 2       . . x . .
        query 3       . . x x .
        query 4       . . . . x

    A segment may be a tree: a page and its branches, one after the other. A branch sees the page and itself:

        segment_ids   1 1 1 1 1
        branch_ids    0 1 1 2 2
        query 0       x . . . .
        query 1       x x . . .
        query 2       x x x . .
        query 3       x . . x .
        query 4       x . . x x

    Args:
      query: queries. H may be a multiple of G (grouped-query attention): head i reads key-value head i // (H // G).
      key: keys.
      value: values.
      segment_ids: segment of each position, 0 for padding; None means that every row is one segment.
      branch_ids: branch of each position within its segment, 0 for pages and for padding; None means that there are no
        trees. It needs `segment_ids` and `causal`.
      branch_tokens: largest number of positions with a branch in a row; None means L. Pallas kernels gather that many
        (`attention_branches.py`), and the branches of a row with more of them become NaN.
      causal: whether a position attends only to itself and earlier positions.
      kernel: one of `KERNELS`.
      mesh_axes: axes of the current mesh that split rows and heads; "xla" does not need them.

    Returns:
      The attended values, in the dtype of `query`. Softmax statistics are computed in float32. Values at padding are
      finite and depend on the kernel.

    Raises:
      ValueError: if the kernel is unknown, or branches are given without segments or without `causal`.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {KERNELS}, got {kernel!r}")
    if branch_ids is not None and (segment_ids is None or not causal):
        raise ValueError("branch_ids: branches need segment_ids, and causal attention")
    if segment_ids is None and kernel != "xla":
        # The kernels always take segments, because these also mask the padding that they add.
        segment_ids = jnp.ones(query.shape[:2], jnp.int32)
    ids = (segment_ids,) if branch_ids is None else (segment_ids, branch_ids)
    if kernel == "cpu":
        return _on_each_device(attention_cpu.attend, query, key, value, ids, causal, mesh_axes)
    # A Pallas kernel, if one supports the shapes.
    for name in _CANDIDATES[kernel]:
        obstacle = _obstacle(name, query, key)
        if obstacle is None:
            attend = _MODULES[name].attend
            if branch_ids is not None:
                attend = functools.partial(attention_branches.attend, attend, branch_tokens or query.shape[1])
            return _on_each_device(attend, query, key, value, ids, causal, mesh_axes)
        _warn_once(f"attention: {obstacle}; falling back to a slower kernel")

    # Otherwise XLA, with a mask for each block of queries.
    length = query.shape[1]

    def mask(queries: slice, keys: slice) -> Bool[Array, "B l k"] | None:
        allowed = None
        if segment_ids is not None:
            # [B, l, k]: query and key are in the same segment. Padding is segment 0 and attends to padding.
            allowed = segment_ids[:, queries, None] == segment_ids[:, None, keys]
        if branch_ids is not None:
            allowed &= attention_branches.can_see(branch_ids[:, queries, None], branch_ids[:, None, keys])
        if causal:
            is_earlier = jnp.arange(length)[queries, None] >= jnp.arange(length)[None, keys]
            allowed = is_earlier[None] if allowed is None else allowed & is_earlier
        return allowed

    # In the order of the products: keys [B, G, h, K], values [B, G, K, h].
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
    # The backward pass recomputes the scores of each block from queries, keys and values. With the result kept, nothing
    # else of the forward pass runs again.
    return checkpoint_name(_attend_in_blocks(query, key, value, mask, causal), ATTENTION_OUT)


@ordinary_modes()
def cached_attention(
    query: Float[Array, "B L H h"],
    key: Float[Array, "B G h K"],
    value: Float[Array, "B G K h"],
    *,
    visible: Bool[Array, "#B L K"],
) -> Float[Array, "B L H h"]:
    """Attends from new positions to the slots of a cache.

    Args:
      query: queries of the new positions.
      key: keys of all slots. The axes of keys and values are those of `KVCache`, so nothing is transposed.
      value: values of all slots.
      visible: the slots that each position attends to.

    Returns:
      The attended values, in the dtype of `value`.
    """
    return _attend_in_blocks(query, key, value, lambda queries, keys: visible[:, queries, keys], causal=False)


def _on_each_device(
    attend: Callable, query, key, value, ids: tuple[Array, ...], causal: bool, mesh_axes: AttentionMesh
):
    """Calls a kernel on the rows and heads of each device of the current mesh; `ids` are segments, and branches."""
    sizes = jax.sharding.get_abstract_mesh().shape

    def keep(axes, size):
        axes = tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
        return axes if size % math.prod(sizes[axis] for axis in axes) == 0 else ()

    # Drop axes that do not divide the size: every device then computes all of these rows or heads.
    rows, heads = keep(mesh_axes.rows, query.shape[0]), keep(mesh_axes.heads, query.shape[2])
    attend = functools.partial(attend, causal=causal)
    if not rows and not heads:
        return attend(query, key, value, *ids)
    num_shards = math.prod(sizes[axis] for axis in heads)
    if key.shape[2] % num_shards:
        # The key-value heads cannot be split evenly, for instance because there are fewer heads than devices. Repeat
        # each head until they can: then every device has the key-value heads of its query heads.
        copies = num_shards // math.gcd(key.shape[2], num_shards)
        key, value = jnp.repeat(key, copies, axis=2), jnp.repeat(value, copies, axis=2)
    head_spec, row_spec = P(rows or None, None, heads or None), P(rows or None)
    # No check of replication, because Pallas calls have no rule for it.
    in_specs = (head_spec,) * 3 + (row_spec,) * len(ids)
    return jax.shard_map(attend, in_specs=in_specs, out_specs=head_spec, check_vma=False)(query, key, value, *ids)


def _obstacle(kernel: str, query, key) -> str | None:
    """Returns why a Pallas kernel cannot compute attention of these arrays, or None."""
    module = _MODULES[kernel]
    # Every supported version of JAX has splash.
    if kernel != "splash" and (reason := module.unavailable()) is not None:
        return reason
    reason = module.unsupported(query.shape, key.shape, query.dtype)
    return reason and f"{kernel} does not support {reason}"


def _log_choice(kernel: str, device: jax.Device, missing: Sequence[str] = ()) -> str:
    reasons = f" ({'; '.join(missing)})" if missing else ""
    _log_once(f"attention: kernel {kernel} on {getattr(device, 'device_kind', device.platform)}{reasons}")
    return kernel


@functools.cache
def _log_once(message: str) -> None:
    _log.info(message)


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def _attend_in_blocks(query, key, value, mask: Callable[[slice, slice], Array | None], causal: bool):
    """Computes softmax attention, one block of queries at a time.

    Args:
      query: queries [B, L, H, h].
      key: keys [B, G, h, K].
      value: values [B, G, K, h].
      mask: returns for a slice of the queries and a slice of the keys which queries attend to which keys; None for all.
      causal: whether to skip the keys after each block of queries.
    """
    batch, length, num_heads, width = query.shape
    groups, repeats = key.shape[1], num_heads // key.shape[1]
    # Group the query heads by key-value head: query [B, G, R, L, h].
    query = query.reshape(batch, length, groups, repeats, width).transpose(0, 2, 3, 1, 4) * width**-0.5

    # Checkpoint, so that the backward pass recomputes the scores instead of storing them.
    @jax.checkpoint
    def attend(block, keys, values, allowed):
        # The R heads of a group share its keys, so all their queries are rows of one matrix product.
        size = block.shape[3]
        rows = block.reshape(batch, groups, repeats * size, width)
        scores = jnp.einsum("bgmh,bghk->bgmk", rows, keys, preferred_element_type=jnp.float32)
        if allowed is not None:
            scores = scores.reshape(batch, groups, repeats, size, -1)
            scores = jnp.where(allowed[:, None, None], scores, _MASKED)
            scores = scores.reshape(batch, groups, repeats * size, -1)
        # Subtract the maximum, so that exp cannot overflow. It cancels in the result, so it needs no gradient. Divide
        # by the sum only after mixing: that takes h instead of K divisions per query.
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.einsum("bgmk,bgkh->bgmh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return (mixed / total).astype(values.dtype).reshape(batch, groups, repeats, size, width)

    # Long rows get larger blocks instead of more blocks.
    blocks = []
    block_size = max(_QUERY_BLOCK, -(-length // _MAX_BLOCKS))
    for start in range(0, length, block_size):
        queries = slice(start, min(start + block_size, length))
        # The keys after a causal block are masked for all its queries, so they are excluded from the products.
        keys = slice(0, queries.stop if causal else key.shape[3])
        block = attend(query[:, :, :, queries], key[..., keys], value[:, :, keys], mask(queries, keys))
        blocks.append(block)
    # Back to [B, L, H, h].
    out = jnp.concatenate(blocks, axis=3) if len(blocks) > 1 else blocks[0]
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, width)
