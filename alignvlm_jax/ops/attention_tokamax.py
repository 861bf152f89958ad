"""Flash attention for Hopper GPUs (H100, H200), with the Mosaic kernels of tokamax.

Axes: B rows, L positions, H query heads, G key-value heads, h head width.

The kernels use Hopper's own instructions for matrix products and copies, and grouped queries read their shared heads
without a copy of them. `jax.nn.dot_product_attention` calls no such kernel for packed rows: it takes no segments, and
the packed rows of cuDNN's attention (in a private module of JAX) read the wrong keys for grouped queries before July
2026, see github.com/jax-ml/jax/pull/39521.

The public function of tokamax (github.com/openxla/tokamax, Apache-2.0) takes a mask of L x L for each row. Only its
private modules take a range of keys for each query, so this module requires exact versions, and no other module imports
tokamax. `unavailable` says if another version is installed.

A range of keys describes a row in which each segment is contiguous, as `data/packing.py` makes them:

    segment_ids   1 1 2 2 0
    start         0 0 2 2 4
    end, causal   1 2 3 4 5
    end           2 2 4 4 5

Any other row is sorted by segment first. That branch is not taken, and costs no time, while all rows are contiguous.
The compiler still reserves memory for it: another copy of what the kernels read.
"""

import contextlib
import functools
import importlib.metadata
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from alignvlm_jax.ops.checkpoint_names import ATTENTION_OUT

VERSIONS = ("0.0.12", "0.0.17")
"""The first is the last one for Python 3.11 and JAX 0.10, the second is for Python 3.12 and JAX 0.11."""

_BLOCK = 128
_WIDEST_HEAD = 128  # two accumulators of the backward kernel must fit into the registers
_NO_SEGMENT = -1


def unavailable() -> str | None:
    """Returns why the kernels cannot be used in this environment, or None."""
    try:
        version = importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError:
        return "tokamax is not installed (pip install 'alignvlm-jax[tokamax]')"
    return None if version in VERSIONS else f"tokamax {version} is none of {', '.join(VERSIONS)}"


def unsupported(query_shape: tuple[int, ...], key_shape: tuple[int, ...], dtype: jnp.dtype) -> str | None:
    """Returns the property of these shapes or this dtype that the kernels do not support, or None."""
    num_heads, width = query_shape[2:]
    if num_heads % key_shape[2]:
        return f"{num_heads} heads that share {key_shape[2]} key-value heads"
    if width > _WIDEST_HEAD:
        return f"heads of width {width}, above {_WIDEST_HEAD}"
    return None if dtype in (jnp.bfloat16, jnp.float16) else f"dtype {jnp.dtype(dtype)}"


def attend(
    query: Float[Array, "B L H h"],
    key: Float[Array, "B L G h"],
    value: Float[Array, "B L G h"],
    segment_ids: Int[Array, "B L"],
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "B L H h"]:
    """Computes `attention.packed_attention` for the rows and heads of one device.

    Args:
      query: queries.
      key: keys.
      value: values.
      segment_ids: segment of each position.
      causal: whether a position attends only to itself and earlier positions.
      interpret: whether to use plain array operations with the same ranges of keys, which work on a CPU.
    """
    length = query.shape[1]

    def pad(array, fill=0):
        return jnp.pad(array, ((0, 0), (0, -length % _BLOCK)) + ((0, 0),) * (array.ndim - 2), constant_values=fill)

    segment_ids = pad(segment_ids, _NO_SEGMENT)
    return _attend(causal, interpret, segment_ids, pad(query), pad(key), pad(value))[:, :length]


def key_ranges(segment_ids: Int[Array, "B L"]) -> tuple[Int[Array, "B L"], Int[Array, "B L"]]:
    """Returns the first position of the segment of each position, and the position after its last one."""
    positions = jnp.arange(segment_ids.shape[1])
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    is_first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    is_last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    start = jax.lax.cummax(jnp.where(is_first, positions, 0), axis=1)
    end = jax.lax.cummin(jnp.where(is_last, positions + 1, segment_ids.shape[1]), axis=1, reverse=True)
    return start, end


def is_contiguous(segment_ids: Int[Array, "B L"]) -> Bool[Array, ""]:
    """Returns whether no segment of any row is interrupted by another."""

    def num_runs(ids):
        return jnp.sum(ids[:, 1:] != ids[:, :-1], axis=1)

    # Sorting joins the runs of a segment, so it leaves fewer runs if a segment has several.
    return jnp.all(num_runs(segment_ids) == num_runs(jnp.sort(segment_ids, axis=1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(causal: bool, interpret: bool, segment_ids, query, key, value):
    return _forward(causal, interpret, segment_ids, query, key, value)[0]


def _forward(causal: bool, interpret: bool, segment_ids, query, key, value):
    kernel = functools.partial(_plain_forward if interpret else _flash_forward, causal)
    attended, statistics = checkpoint_name(_in_order(kernel, segment_ids, query, key, value), ATTENTION_OUT)
    return attended, (segment_ids, query, key, value, attended, statistics)


def _backward(causal: bool, interpret: bool, residuals, cotangent):
    kernel = functools.partial(_plain_backward if interpret else _flash_backward, causal)
    return None, *_in_order(kernel, *residuals, cotangent)


_attend.defvjp(_forward, _backward)


def _in_order(kernel: Callable, segment_ids, *arrays):
    """Calls a kernel with the ranges of keys of rows and their arrays [B, L, ...], sorted by segment if necessary."""

    def contiguous(segment_ids, *arrays):
        return kernel(*key_ranges(segment_ids), *arrays)

    def interrupted(segment_ids, *arrays):
        order = jnp.argsort(segment_ids, axis=1, stable=True)
        results = contiguous(*jax.tree.map(functools.partial(_permute, order), (segment_ids, *arrays)))
        return jax.tree.map(functools.partial(_permute, jnp.argsort(order, axis=1)), results)

    return jax.lax.cond(is_contiguous(segment_ids), contiguous, interrupted, segment_ids, *arrays)


def _permute(order: Int[Array, "B L"], array: Array) -> Array:
    return jnp.take_along_axis(array, order.reshape(order.shape + (1,) * (array.ndim - 2)), axis=1)


def _plain_forward(causal: bool, start, end, query, key, value):
    """Computes attention to ranges of keys, with scores of L x L."""
    positions = jnp.arange(query.shape[1])
    if causal:
        end = jnp.minimum(end, positions + 1)
    allowed = (positions >= start[..., None]) & (positions < end[..., None])
    return jax.nn.dot_product_attention(query, key, value, mask=allowed[:, None]), ()


def _plain_backward(causal: bool, start, end, query, key, value, attended, statistics, cotangent):
    del attended, statistics
    forward = functools.partial(_plain_forward, causal, start, end)
    return jax.vjp(lambda *arrays: forward(*arrays)[0], query, key, value)[1](cotangent)


# tokamax is imported when it is used, because it is optional and takes 1.5 seconds. The kernels are jitted functions:
# JAX then lowers them once for both branches of `_in_order`.
@functools.partial(jax.jit, static_argnums=0)
def _flash_forward(causal: bool, start, end, query, key, value):
    """Returns the attended values, and the maximum and the sum of exponentials of each query and head [B, L, H]."""
    with _no_warnings():
        from tokamax._src.ops.attention import pallas_mosaic_gpu_kernel_sm90 as kernels

        kernel = functools.partial(
            kernels.flash_attention_kernel,
            bias=None,
            mask=None,
            is_causal=causal,
            logits_soft_cap=None,
            logits_scale=query.shape[-1] ** -0.5,
            out_dtype=query.dtype,
            normalize_output=True,
            return_residuals=True,
            use_stable_softmax=True,
            rescale_threshold=1.0,
            config=kernels.Config(block_q=64, block_kv=_BLOCK, num_stages=2),
        )

        def attend_row(start, end, query, key, value):
            return kernel(query, key, value, k_start=start[None], k_end=None if causal else end[None])

        attended, statistics = jax.vmap(attend_row)(start, end, query, key, value)
    return attended, tuple(array.transpose(0, 2, 1) for array in statistics)


@functools.partial(jax.jit, static_argnums=0)
def _flash_backward(causal: bool, start, end, query, key, value, attended, statistics, cotangent):
    with _no_warnings():
        from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp_kernel_sm90 as kernels

        kernel = functools.partial(
            kernels.flash_attention_vjp_kernel,
            bias=None,
            mask=None,
            is_causal=causal,
            logits_soft_cap=None,
            logits_scale=query.shape[-1] ** -0.5,
            ds_dtype=None,
            config=kernels.Config(block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64, num_stages=2),
        )

        def differentiate_row(start, end, query, key, value, attended, statistics, cotangent):
            rows = dict(residuals=tuple(array.T for array in statistics), out=attended, dout=cotangent)
            ranges = dict(k_start=start[None], k_end=None if causal else end[None])
            return kernel(query, key, value, **rows, **ranges)[:3]

        return jax.vmap(differentiate_row)(start, end, query, key, value, attended, statistics, cotangent)


@contextlib.contextmanager
def _no_warnings():
    """Ignores that tokamax uses deprecated parts of JAX, which the exact versions above settle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
