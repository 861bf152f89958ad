"""Lookup in a sharded table: values and gradients match those of a complete table, and nothing large is gathered."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from alignvlm_jax.ops import VocabularyMesh
from alignvlm_jax.ops.embedding_lookup import embedding_lookup
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh

AXES = VocabularyMesh(queries=("data", "fsdp"), vocabulary=("tensor",), widths=("fsdp",))
WIDTH, BLOCK = 16, 12


def _inputs(rows, words):
    """Returns a table, the ids to look up, and a cotangent of the result."""
    rng = np.random.default_rng(0)
    table, cotangent = rng.normal(size=(words, WIDTH)), rng.normal(size=(rows, 20, WIDTH))
    ids = rng.integers(0, words, (rows, 20))
    ids[0, :5] = [0, words - 1, 7, 7, 7]  # The first word, the last word, and a repeated one.
    return jnp.asarray(table, jnp.float32), jnp.asarray(ids), jnp.asarray(cotangent, jnp.float32)


def _with_gradient(table, ids, cotangent):
    """Returns the looked-up rows and the gradient of the table."""

    def lookup(table):
        return embedding_lookup(table, ids, dtype="float32", block_size=BLOCK, mesh_axes=AXES)

    value, pull_back = jax.vjp(lookup, table)
    return value, pull_back(cotangent)[0]


def _compile(mesh_sizes, table, ids, cotangent):
    """Compiles `_with_gradient` for a mesh; returns the program and its arguments placed on the mesh."""
    mesh = make_mesh(MeshConfig(*mesh_sizes))
    word_axis = "tensor" if table.shape[0] % mesh.shape["tensor"] == 0 else None
    rows = ("data", "fsdp") if ids.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    specs = jax.P(word_axis, "fsdp"), jax.P(rows), jax.P(rows)
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    with jax.set_mesh(mesh):
        compiled = jax.jit(_with_gradient, in_shardings=tuple(shardings), out_shardings=(shardings[1], shardings[0]))
        compiled = compiled.lower(table, ids, cotangent).compile()
    arrays = (table, ids, cotangent)
    return compiled, [jax.device_put(array, sharding) for array, sharding in zip(arrays, shardings, strict=True)]


# 101 words are not divisible by tensor, nor 6 rows by data x fsdp; such axes stay replicated.
@pytest.mark.parametrize("mesh_sizes", [(2, 2, 2), (1, 8, 1), (1, 1, 8), (8, 1, 1)])
@pytest.mark.parametrize("rows, words", [(8, 96), (8, 101), (6, 96)])
def test_values_and_gradients_match_a_complete_table(mesh_sizes, rows, words):
    table, ids, cotangent = _inputs(rows, words)
    compiled, placed = _compile(mesh_sizes, table, ids, cotangent)
    value, gradient = compiled(*placed)
    np.testing.assert_array_equal(value, np.asarray(table)[np.asarray(ids)])
    expected = np.zeros((words, WIDTH))
    np.add.at(expected, np.asarray(ids).ravel(), np.asarray(cotangent, np.float64).reshape(-1, WIDTH))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_no_device_holds_more_than_its_part_of_the_table():
    # Enough words for the table to be by far the largest array.
    table, ids, cotangent = _inputs(8, 960)
    compiled, _ = _compile((2, 2, 2), table, ids, cotangent)
    text = compiled.as_text()
    largest = max(
        math.prod(int(size) for size in shape.split(",") if size) for shape in re.findall(r"f32\[([\d,]*)\]", text)
    )
    assert largest <= 960 * WIDTH // 4, "this device's part of the table"
    assert "all-gather" in text and "reduce-scatter" in text
