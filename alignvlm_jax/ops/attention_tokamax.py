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
"""

import contextlib
import functools
import importlib.metadata
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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

    query, key, value, segment_ids = pad(query), pad(key), pad(value), pad(segment_ids, _NO_SEGMENT)
    attend_ranges = functools.partial(_plain_attention if interpret else _flash_attention, causal)

    def contiguous(query, key, value, segment_ids):
        return attend_ranges(query, key, value, *key_ranges(segment_ids))

    # The checkpoint keeps the sorted arrays out of the residuals, which both branches share.
    @jax.checkpoint
    def scattered(query, key, value, segment_ids):
        order = jnp.argsort(segment_ids, axis=1, stable=True)
        attended = contiguous(
            *(jnp.take_along_axis(heads, order[:, :, None, None], axis=1) for heads in (query, key, value)),
            jnp.take_along_axis(segment_ids, order, axis=1),
        )
        return jnp.take_along_axis(attended, jnp.argsort(order, axis=1)[:, :, None, None], axis=1)

    attended = jax.lax.cond(is_contiguous(segment_ids), contiguous, scattered, query, key, value, segment_ids)
    return attended[:, :length]


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


def _plain_attention(causal: bool, query, key, value, start, end):
    """Computes attention to ranges of keys, with scores of L x L."""
    positions = jnp.arange(query.shape[1])
    if causal:
        end = jnp.minimum(end, positions + 1)
    allowed = (positions >= start[..., None]) & (positions < end[..., None])
    return jax.nn.dot_product_attention(query, key, value, mask=allowed[:, None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash_attention(causal: bool, query, key, value, start, end):
    return _forward(causal, query, key, value, start, end)[0]


# tokamax is imported when it is used, because it is optional and takes 1.5 seconds.
# Compiled functions of their own, because both branches of `attend` call them: JAX then lowers the kernels once.
@functools.partial(jax.jit, static_argnums=0)
def _forward(causal: bool, query, key, value, start, end):
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

    def attend_row(query, key, value, start, end):
        return kernel(query, key, value, k_start=start[None], k_end=None if causal else end[None])

    with _no_warnings():
        attended, statistics = jax.vmap(attend_row)(query, key, value, start, end)
    return attended, (query, key, value, start, end, attended, statistics)


def _backward(causal: bool, residuals, cotangent):
    return *_gradients(causal, residuals, cotangent), None, None


@functools.partial(jax.jit, static_argnums=0)
def _gradients(causal: bool, residuals, cotangent):
    with _no_warnings():
        from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp_kernel_sm90 as kernels

    kernel = functools.partial(
        kernels.flash_attention_vjp_kernel,
        bias=None,
        mask=None,
        is_causal=causal,
        logits_soft_cap=None,
        ds_dtype=None,
        config=kernels.Config(block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64, num_stages=2),
    )

    def differentiate_row(query, key, value, start, end, attended, statistics, cotangent):
        gradients = kernel(
            query,
            key,
            value,
            residuals=statistics,
            out=attended,
            dout=cotangent,
            k_start=start[None],
            k_end=None if causal else end[None],
            logits_scale=query.shape[-1] ** -0.5,
        )
        return gradients[:3]

    with _no_warnings():
        return jax.vmap(differentiate_row)(*residuals, cotangent)


_flash_attention.defvjp(_forward, _backward)


@contextlib.contextmanager
def _no_warnings():
    """Ignores that tokamax uses deprecated parts of JAX, which the exact versions above settle."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
