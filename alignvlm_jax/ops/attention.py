"""Attention over packed rows, and over a key-value cache.

Axes: B rows, L query positions, K key positions, H query heads, G key-value heads, R = H / G, h head width.

Three kernels give the same numbers (up to rounding); none of them holds an [L, L] array of all heads, and each takes
segments, so that rows can be packed:

    "splash"  TPU. Pallas, in `attention_splash.py`: blocks above the diagonal are skipped.
    "flash"   NVIDIA GPUs from Ampere on. Pallas (Triton), in `attention_flash.py`. (`jax.nn.dot_product_attention`
              takes no segments, only a mask of L x L.)
    "xla"     anything: CPUs, older GPUs. Below: queries are taken in blocks, and a block's scores are computed again in
              the backward pass: no [L, K] array outlives its block, and a causal block never looks at the keys behind
              it. On a CPU this is 2-3 times the speed of the plain form (scores stay in the cache).

`default_kernel` says which a device gets. What a kernel cannot take (a head width, say) goes to "xla", with a warning.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from alignvlm_jax.ops import attention_flash, attention_splash

KERNELS = ("splash", "flash", "xla")

_MASKED = -1e30  # finite, so that a row of padding (every key masked) stays free of NaN
_QUERY_BLOCK = 64
_MOST_BLOCKS = 32  # they are unrolled: more would take long to compile
_AMPERE = 8.0

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class AttentionMesh:
    """Names of mesh axes; those that the mesh in force lacks, or that do not divide what they cut, cut nothing.

    XLA cannot cut up a Pallas kernel by itself: each device calls it on its own rows and heads.

    Attributes:
      rows: axes that cut the rows.
      heads: axes that cut the heads.
    """

    rows: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


def default_kernel(device: jax.Device) -> str:
    """The fastest kernel that runs on a device."""
    if device.platform == "tpu":
        return "splash"
    if device.platform in ("gpu", "cuda") and float(getattr(device, "compute_capability", 0) or 0) >= _AMPERE:
        return "flash"
    return "xla"


def packed_attention(
    query: Float[Array, "B L H h"],
    key: Float[Array, "B L G h"],
    value: Float[Array, "B L G h"],
    *,
    segment_ids: Int[Array, "B L"] | None = None,
    causal: bool,
    kernel: str = "xla",
    mesh_axes: AttentionMesh = AttentionMesh(),
) -> Float[Array, "B L H h"]:
    """Attends within each segment of a row, and only backwards if `causal`.

    Example, one row holding two examples and a pad, causal; `x` marks what a query sees:

        segment_ids   1 1 2 2 0
        query 0       x . . . .
        query 1       x x . . .
        query 2       . . x . .
        query 3       . . x x .
        query 4       . . . . x

    Args:
      query: H may be a multiple of G (grouped-query attention): head i reads key-value head i // (H // G).
      key: keys.
      value: values.
      segment_ids: 0 is padding; no attention crosses a segment. None means that every row is one segment.
      causal: whether a position sees only itself and what precedes it.
      kernel: one of `KERNELS`.
      mesh_axes: how rows and heads lie on the mesh in force; "xla" needs no telling.

    Returns:
      The attended values, in the dtype of `query`; softmax statistics are float32.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {KERNELS}, got {kernel!r}")
    if kernel != "xla":
        module = attention_splash if kernel == "splash" else attention_flash
        reason = module.refuses(query.shape, key.shape)
        if reason is None:
            return _on_each_device(module.attend, query, key, value, segment_ids, causal, mesh_axes)
        _say_once(f"attention: {kernel} cannot take {reason}; falling back to XLA's blocks, which are slower")
    length = query.shape[1]

    def mask(queries: slice, keys: slice) -> Bool[Array, "B l k"] | None:
        allowed = None
        if segment_ids is not None:
            allowed = segment_ids[:, queries, None] == segment_ids[:, None, keys]
        if causal:
            backwards = jnp.arange(length)[queries, None] >= jnp.arange(length)[None, keys]
            allowed = backwards[None] if allowed is None else allowed & backwards
        return allowed

    return _attend_in_blocks(query, key, value, mask, causal)


def cached_attention(
    query: Float[Array, "B L H h"],
    key: Float[Array, "B K G h"],
    value: Float[Array, "B K G h"],
    *,
    visible: Bool[Array, "#B L K"],
) -> Float[Array, "B L H h"]:
    """Attends from new positions to the slots of a cache that `visible` names."""
    return _attend_in_blocks(query, key, value, lambda queries, keys: visible[:, queries, keys], causal=False)


def _on_each_device(attend: Callable, query, key, value, segment_ids, causal: bool, mesh_axes: AttentionMesh):
    """Calls a kernel on the rows and heads that each device of the mesh in force holds."""
    sizes = jax.sharding.get_abstract_mesh().shape

    def cuts(axes, size):
        axes = tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
        return axes if size % math.prod(sizes[axis] for axis in axes) == 0 else ()

    rows, heads = cuts(mesh_axes.rows, query.shape[0]), cuts(mesh_axes.heads, query.shape[2])
    if segment_ids is None:
        segment_ids = jnp.ones(query.shape[:2], jnp.int32)
    attend = functools.partial(attend, causal=causal)
    if not rows and not heads:
        return attend(query, key, value, segment_ids)
    pieces = math.prod(sizes[axis] for axis in heads)
    if key.shape[2] % pieces:  # fewer key-value heads than devices: every device needs a copy of one
        copies = pieces // math.gcd(key.shape[2], pieces)
        key, value = jnp.repeat(key, copies, axis=2), jnp.repeat(value, copies, axis=2)
    of_heads, of_rows = P(rows or None, None, heads or None), P(rows or None)
    # Replication is not checked: Pallas calls have no rule for it.
    return jax.shard_map(
        attend, in_specs=(of_heads, of_heads, of_heads, of_rows), out_specs=of_heads, check_vma=False
    )(query, key, value, segment_ids)


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)


def _attend_in_blocks(query, key, value, mask: Callable[[slice, slice], Array | None], causal: bool):
    """Softmax attention, a block of queries at a time; `mask` says what queries and keys of two slices may see."""
    batch, length, num_heads, width = query.shape
    groups, repeats = key.shape[2], num_heads // key.shape[2]
    query = query.reshape(batch, length, groups, repeats, width).transpose(0, 2, 3, 1, 4) * width**-0.5
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)

    @jax.checkpoint
    def attend(block, keys, values, allowed):
        # The repeats of a group share its keys: they are rows of one matrix product.
        size = block.shape[3]
        rows = block.reshape(batch, groups, repeats * size, width)
        scores = jnp.einsum("bgmh,bghk->bgmk", rows, keys, preferred_element_type=jnp.float32)
        if allowed is not None:
            scores = scores.reshape(batch, groups, repeats, size, -1)
            scores = jnp.where(allowed[:, None, None], scores, _MASKED)
            scores = scores.reshape(batch, groups, repeats * size, -1)
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.einsum("bgmk,bgkh->bgmh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return (mixed / total).astype(values.dtype).reshape(batch, groups, repeats, size, width)

    blocks = []
    block_size = max(_QUERY_BLOCK, -(-length // _MOST_BLOCKS))
    for start in range(0, length, block_size):
        queries = slice(start, min(start + block_size, length))
        keys = slice(0, queries.stop if causal else key.shape[3])
        block = attend(query[:, :, :, queries], key[..., keys], value[:, :, keys], mask(queries, keys))
        blocks.append(block)
    out = jnp.concatenate(blocks, axis=3) if len(blocks) > 1 else blocks[0]
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, width)
