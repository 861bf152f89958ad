"""The vocabulary split over a mesh: values match one device, and nothing large is gathered or held.

The mesh is data 2 x fsdp 2 x tensor 2: queries are split over (data, fsdp), rows of tables over tensor, and their
widths over fsdp.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from alignvlm_jax.ops import (
    VocabularyMesh,
    linear_cross_entropy,
    vocabulary_attention,
    vocabulary_statistics,
)
from alignvlm_jax.ops.dense_align import dense_distribution, dense_vocabulary_attention
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from tests.ops import dense

AXES = VocabularyMesh(queries=("data", "fsdp"), vocabulary=("tensor",), widths=("fsdp",))
WIDTH, VALUE_WIDTH, BLOCK = 16, 24, 32
TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def attention_inputs(rows, length, words):
    """Returns q, keys, scale, bias, values and a cotangent of the result."""
    rng = np.random.default_rng(0)
    tables = [(words, WIDTH), (words,), (words,), (words, VALUE_WIDTH)]
    shapes = [(rows, length, WIDTH), *tables, (rows, length, VALUE_WIDTH)]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    arrays[2] += 2
    return arrays


def loss_inputs(rows, length, words):
    """Returns inputs whose rows have different numbers of weights, so that devices have different numbers of chunks."""
    rng = np.random.default_rng(0)
    weights = rng.random((rows, length)) * (rng.random((rows, length)) < np.linspace(0, 1, rows)[:, None])
    hidden, head = rng.normal(size=(rows, length, WIDTH)), rng.normal(size=(words, WIDTH))
    targets = jnp.asarray(rng.integers(0, words, (rows, length)))
    hidden, head, weights = (jnp.asarray(array, jnp.float32) for array in (hidden, head, weights))
    return [hidden, head, targets, weights]


def place(mesh, arrays, words):
    """Splits tables over (tensor, fsdp) and other arrays over (data, fsdp); indivisible axes stay whole."""
    word_axis = "tensor" if words % mesh.shape["tensor"] == 0 else None

    def spec(array):
        if array.shape[0] == words:
            return jax.P(word_axis, "fsdp") if array.ndim == 2 else jax.P(word_axis)
        return jax.P(("data", "fsdp") if array.shape[0] % 4 == 0 else None)

    return [jax.device_put(array, NamedSharding(mesh, spec(array))) for array in arrays]


def compile_on(mesh, function, arrays, num_gradients):
    """Compiles a function so that gradients are sharded like their arguments, as in the train step."""
    with jax.set_mesh(mesh):
        shardings = (None, tuple(array.sharding for array in arrays[:num_gradients]))
        return jax.jit(function, out_shardings=shardings).lower(*arrays).compile()


def attention_with_gradients(attention):
    """Returns a function from `attention_inputs` to the value and the gradients of the first five."""

    def run(*arrays):
        value, pull_back = jax.vjp(attention, *arrays[:5])
        return value, pull_back(arrays[5])

    return run


def streamed_attention(*arrays, **options):
    return vocabulary_attention(*arrays, block_size=BLOCK, mesh_axes=AXES, **options)


# The statistics come from the covariance for 8 x 16 queries on 4 devices, and from a second pass for 8 x 2. 101 words
# are not divisible by tensor, so every device passes over all of them. 6 rows are not divisible by data x fsdp.
@pytest.mark.parametrize(("rows", "length", "words"), [(8, 16, 96), (8, 2, 96), (8, 16, 101), (6, 16, 96)])
def test_attention_matches_one_device(mesh, rows, length, words):
    arrays = attention_inputs(rows, length, words)
    placed = place(mesh, arrays, words)
    value, gradients = compile_on(mesh, attention_with_gradients(streamed_attention), placed, 5)(*placed)
    expected, expected_gradients = dense.in_float64(attention_with_gradients(dense_vocabulary_attention), *arrays)
    assert dense.distance(value, expected) <= TOLERANCE
    for got, reference in zip(gradients, expected_gradients, strict=True):
        assert dense.distance(got, reference) <= TOLERANCE


def test_summary_and_statistics_match_one_device(mesh):
    *arrays, _ = attention_inputs(8, 4, 96)
    p = dense.in_float64(dense_distribution, *arrays[:4])

    @jax.jit
    def run(*arrays):
        statistics = vocabulary_statistics(arrays[1], mesh_axes=AXES)
        options = dict(statistics=statistics, entropy=True, top_k=5, block_size=BLOCK, mesh_axes=AXES)
        return vocabulary_attention(*arrays, **options)

    with jax.set_mesh(mesh):
        value, summary = run(*place(mesh, arrays, 96))
    assert dense.distance(value, p @ np.asarray(arrays[4], float)) <= TOLERANCE
    assert dense.distance(summary.entropy, dense.entropy(p)) <= TOLERANCE
    np.testing.assert_array_equal(summary.top_ids, np.argsort(-p, axis=-1)[..., :5])
    np.testing.assert_allclose(summary.top_probabilities, -np.sort(-p, axis=-1)[..., :5], rtol=1e-4)


def loss_with_gradients(loss):
    def run(hidden, head, targets, weights):
        return jax.value_and_grad(loss, (0, 1))(hidden, head, targets, weights)

    return run


def streamed_loss(*arrays, kept_bytes):
    options = dict(chunk_size=8, block_size=BLOCK, kept_bytes=kept_bytes)
    return linear_cross_entropy(*arrays, z_loss=0.01, mesh_axes=AXES, **options)[0]


# Of the 40 positions of a device, 0 to 5 chunks of 8 contain weights. Numbers are kept for the first two, or for all.
@pytest.mark.parametrize(("words", "kept_bytes"), [(96, 4 * 48 * 2 * 8), (101, 1 << 20)])
def test_loss_matches_one_device(mesh, words, kept_bytes):
    arrays = loss_inputs(8, 20, words)
    placed = place(mesh, arrays, words)
    loss = functools.partial(streamed_loss, kept_bytes=kept_bytes)
    value, gradients = compile_on(mesh, loss_with_gradients(loss), placed, 2)(*placed)
    expected, expected_gradients = dense.in_float64(
        loss_with_gradients(lambda *a: dense.linear_cross_entropy(*a, z_loss=0.01)), *arrays
    )
    np.testing.assert_allclose(value, expected, rtol=TOLERANCE)
    for got, reference in zip(gradients, expected_gradients, strict=True):
        assert dense.distance(got, reference) <= TOLERANCE


@pytest.mark.parametrize("operation", ["attention", "loss"])
def test_no_table_is_gathered_over_tensor_and_nothing_has_size_queries_times_words(mesh, operation):
    # No other axis has 704 or 352 entries, so words are recognized by their number in the compiled text.
    words, rows, length = 704, 8, 256
    if operation == "attention":
        arrays, function, count = attention_inputs(rows, length, words), attention_with_gradients(streamed_attention), 5
    else:
        # Numbers are kept for 16 of the 512 positions of a device.
        loss = functools.partial(streamed_loss, kept_bytes=4 * 352 * 16)
        arrays, function, count = loss_inputs(rows, length, words), loss_with_gradients(loss), 2
    placed = place(mesh, arrays, words)
    text = compile_on(mesh, function, placed, count).as_text()
    shapes = set(map(_shape, re.findall(r"\w+\[([\d,]*)\]", text)))
    local_queries, local_words = rows * length // 4, words // 2
    assert (local_words, WIDTH // 2) in shapes, "each device holds its part of a table"
    assert (local_words, WIDTH) not in shapes, "a device never gathers the full width of its rows"
    assert not any(words in shape for shape in shapes), "no device holds all rows"
    # The largest arrays are the scores of a block, the local queries and the local tables.
    assert max(map(math.prod, shapes)) <= local_queries * BLOCK < local_queries * local_words / 10
    for gathered in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text):
        assert _shape(gathered) in ((BLOCK, WIDTH), (BLOCK, VALUE_WIDTH), (WIDTH,)), "a block over fsdp, or the mean"


def test_the_dense_form_fails_the_size_check(mesh):
    """Compiled for the same mesh, the dense form does hold queries times words: the test above can fail."""
    arrays = attention_inputs(8, 256, 704)
    placed = place(mesh, arrays, 704)
    text = compile_on(mesh, attention_with_gradients(dense_vocabulary_attention), placed, 5).as_text()
    assert max(math.prod(_shape(shape)) for shape in re.findall(r"\w+\[([\d,]*)\]", text)) >= 8 * 256 // 4 * 704 // 2


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)
