"""Values and gradients of the kernels against float64, the choice of a kernel, and the fallback.

The Pallas kernels run in Pallas's interpreter, which executes their arithmetic and masks. That they compile is tested
separately: for TPUs in tests/commands/test_compile.py, and for CUDA below.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.models import hardware
from alignvlm_jax.models.language import LanguageConfig
from alignvlm_jax.ops import attention, attention_cpu, attention_flash, attention_splash, attention_tokamax
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from tests.abstract_gpu import gpu_mesh

KERNELS = {"splash": attention_splash, "tokamax": attention_tokamax, "flash": attention_flash, "cpu": attention_cpu}


def _attend(name):
    """Returns the function of a kernel; those of Pallas run in the interpreter."""
    function = KERNELS[name].attend
    return function if name == "cpu" else functools.partial(function, interpret=True)


def _inputs(length, heads=4, groups=2, width=24, rows=2):
    """Returns random queries, keys and values, and segments with padding at the end."""
    rng = np.random.default_rng(0)
    shapes = [(rows, length, heads, width), (rows, length, groups, width), (rows, length, groups, width)]
    query, key, value = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    # Three segments and padding; none of the cuts is at a block border.
    cuts = np.array([0, length // 5, length // 2, length - length // 7, length])
    segments = np.repeat(np.repeat([[1, 2, 3, 0]], np.diff(cuts), axis=1), rows, axis=0)
    return query, key, value, jnp.asarray(segments, jnp.int32)


def _plain(query, key, value, segments, causal):
    """Computes softmax attention with an explicit mask."""
    repeats = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, repeats, axis=2), jnp.repeat(value, repeats, axis=2)
    allowed = segments[:, :, None] == segments[:, None, :]
    if causal:
        allowed &= jnp.tril(jnp.ones(allowed.shape[1:], bool))
    scores = jnp.einsum("blhd,bkhd->bhlk", query, key) / np.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf))
    return jnp.einsum("bhlk,bkhd->blhd", weights, value)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("length, causal", [(140, True), (100, False)])  # Neither length is a multiple of a block.
def test_values_and_gradients_match_float64(name, length, causal):
    query, key, value, segments = _inputs(length)
    attend = functools.partial(_attend(name), causal=causal)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=query.shape), jnp.float32)

    @jax.jit
    def with_gradients(query, key, value):
        attended, pull_back = jax.vjp(lambda *qkv: attend(*qkv, segments), query, key, value)
        return attended, pull_back(cotangent)

    got, gradients = with_gradients(query, key, value)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(array, np.float64)) for array in (query, key, value)]
        expected, pull_back = jax.vjp(lambda *qkv: _plain(*qkv, segments, causal), *wide)
        expected_gradients = pull_back(jnp.asarray(np.asarray(cotangent, np.float64)))
    for a, b in zip((got, *gradients), (expected, *expected_gradients), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 1, 8), (8, 1, 1)])  # (1, 1, 8) has more devices than key-value heads.
def test_on_a_mesh_each_device_computes_its_rows_and_heads(monkeypatch, name, mesh):
    monkeypatch.setattr(KERNELS[name], "attend", _attend(name))
    monkeypatch.setattr(attention, "_obstacle", lambda *args: None)
    query, key, value, segments = _inputs(24, heads=8, groups=4, rows=8)
    axes = attention.AttentionMesh(("data", "fsdp"), ("tensor",))

    @jax.jit
    def attend(query, key, value, segments):
        return attention.packed_attention(
            query, key, value, segment_ids=segments, causal=True, kernel=name, mesh_axes=axes
        )

    with jax.set_mesh(make_mesh(MeshConfig(*mesh))) as _, sharding.logical_rules():
        text = attend.lower(query, key, value, segments).compile().as_text()
        got = attend(query, key, value, segments)
    np.testing.assert_allclose(got, _plain(query, key, value, segments, True), rtol=2e-5, atol=2e-6)
    assert "all-gather" not in text, "rows and heads stay on their devices"


@pytest.mark.parametrize("causal", [True, False])
def test_cpu_kernel_takes_segments_in_any_order(causal):
    """The loops skip pairs of blocks by the range of their segments, which must never skip a pair that is needed."""
    query, key, value, _ = _inputs(300, heads=2, groups=1, width=4, rows=3)  # three blocks

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(attend, segments):
        out, pull_back = jax.vjp(lambda *qkv: attend(*qkv, segments, causal=causal), query, key, value)
        return out, *pull_back(jnp.cos(query))

    one_per_block = np.repeat([[2, 1, 2], [1, 2, 3], [1, 0, 2]], 100, axis=1)
    mixed = np.repeat(np.random.default_rng(0).integers(0, 4, (3, 30)), 10, axis=1)
    for segments in (one_per_block, mixed):
        segments = jnp.asarray(segments, jnp.int32)
        expected = with_gradients(lambda *args, causal: _plain(*args, causal), segments)
        for a, b in zip(with_gradients(attention_cpu.attend, segments), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5)


def test_an_unsupported_shape_falls_back_with_a_warning(caplog):
    query, key, value, segments = _inputs(20, heads=2, groups=2, width=260)
    attention._warn_once.cache_clear()  # another test may have caused the same warning
    got = attention.packed_attention(query, key, value, segment_ids=segments, causal=True, kernel="flash")
    np.testing.assert_allclose(got, _plain(query, key, value, segments, True), rtol=1e-5, atol=1e-6)
    assert "flash does not support heads of width 260" in caplog.text and "falling back" in caplog.text


@pytest.mark.parametrize(
    "segment_ids, contiguous",
    [
        ([[1, 1, 2, 2, 0], [7, 7, 7, 7, 7], [2, 0, 0, 1, 1]], True),
        ([[1, 1, 2, 2, 0], [1, 2, 2, 1, 0]], False),
        ([[0, 1, 1, 0]], False),
    ],
)
def test_a_segment_that_continues_after_another_is_recognized(segment_ids, contiguous):
    assert attention_tokamax.is_contiguous(jnp.asarray(segment_ids)) == contiguous


def test_tokamax_sorts_rows_whose_segments_are_interrupted():
    query, key, value, _ = _inputs(60)
    segments = jnp.asarray(np.random.default_rng(2).integers(0, 4, (2, 60)), jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(attend, *qkv):
        return jax.value_and_grad(lambda *qkv: jnp.sum(jnp.sin(attend(*qkv, segments, causal=True))), (0, 1, 2))(*qkv)

    (value_a, got), (value_b, expected) = (
        gradients(attend, query, key, value)
        for attend in (functools.partial(attention_tokamax.attend, interpret=True), _plain)
    )
    np.testing.assert_allclose(value_a, value_b, rtol=2e-5)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "kernel, call", [("tokamax", "mosaic_gpu"), ("flash", "triton"), ("xla", "stablehlo.exponential")]
)
def test_each_choice_for_gpus_lowers_for_cuda_without_a_gpu(kernel, call):
    if kernel == "tokamax":
        pytest.importorskip("tokamax")
    query, key, value, segments = (
        array.astype(jnp.bfloat16) if array.dtype == jnp.float32 else array for array in _inputs(196, 12, 4, 64)
    )

    def loss(query, key, value, causal):
        out = attention.packed_attention(query, key, value, segment_ids=segments, causal=causal, kernel=kernel)
        return jnp.sum(out.astype(jnp.float32))

    with gpu_mesh():
        for causal in (True, False):
            step = jax.jit(jax.grad(functools.partial(loss, causal=causal), (0, 1, 2)))
            text = step.trace(query, key, value).lower(lowering_platforms=("cuda",)).as_text()
            assert call in text
            assert kernel != "tokamax" or "x196x4x3x64xbf16" not in text, "the 4 key-value heads are not repeated"


@dataclasses.dataclass
class _FakeDevice:
    platform: str
    compute_capability: str | None = None


@pytest.mark.parametrize(
    "device, kernel, dtype",
    [
        (_FakeDevice("tpu"), "splash", "bfloat16"),
        (_FakeDevice("gpu", "9.0"), "tokamax", "bfloat16"),
        (_FakeDevice("gpu", "10.0"), "flash", "bfloat16"),
        (_FakeDevice("gpu", "8.0"), "flash", "bfloat16"),
        (_FakeDevice("gpu", "7.5"), "xla", "float32"),  # Turing: no bfloat16, and not enough memory for the kernel.
        (_FakeDevice("gpu"), "xla", "float32"),  # AMD reports no compute capability.
        (_FakeDevice("cpu"), "cpu", "float32"),
    ],
)
def test_each_device_has_default_kernels_that_a_config_may_override(monkeypatch, device, kernel, dtype):
    monkeypatch.setattr(attention_tokamax, "unavailable", lambda: None)
    resolved = hardware.resolve(LanguageConfig(), device)
    assert (resolved.attention, resolved.dtype) == (kernel, dtype)
    forced = LanguageConfig(attention="xla", dtype="bfloat16")
    assert hardware.resolve(forced, device) == forced


def test_a_missing_kernel_leaves_the_next_one_and_the_log_says_why(monkeypatch, caplog):
    caplog.set_level("INFO")
    hopper = _FakeDevice("gpu", "9.0")
    attention._log_once.cache_clear()
    monkeypatch.setattr(attention_tokamax.importlib.metadata, "version", lambda name: "0.0.1")
    assert attention.default_kernel(hopper) == "flash"
    monkeypatch.setattr(attention_flash, "_kernels", lambda: None)
    for _ in range(2):
        resolved = hardware.resolve(LanguageConfig(), hopper)
        assert (resolved.attention, resolved.dtype) == ("xla", "bfloat16")
    flash, xla = (record.getMessage() for record in caplog.records)  # each choice is logged once
    assert flash.startswith("attention: kernel flash on gpu (tokamax 0.0.1 is none of")
    assert xla.startswith("attention: kernel xla on gpu (tokamax 0.0.1 is none of") and "JAX 0." in xla
