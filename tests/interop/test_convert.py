"""Conversion of tensors to parameters: names, values, shardings, and reports of all problems."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import convert
from alignvlm_jax.interop.tensor_reader import TensorFiles
from alignvlm_jax.models.weight_table import CONV, TRANSPOSED, Row
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh

ROWS = (
    Row("table", "table"),
    Row("layers/kernel", "layers.{layer}.weight", TRANSPOSED),
    Row("layers/scale", "layers.{layer}.scale"),
    Row("patch/kernel", "patch.weight", CONV),
)
LAYERS = 3
RNG = np.random.default_rng(0)
TENSORS = {
    "table": RNG.normal(size=(10, 8)),
    "patch.weight": RNG.normal(size=(8, 3, 2, 2)),
    **{f"layers.{i}.weight": RNG.normal(size=(4, 200)) for i in range(LAYERS)},
    **{f"layers.{i}.scale": RNG.normal(size=(4,)) for i in range(LAYERS)},
}
# Written out by hand: the [out, in] of Linear is transposed, and the window of Conv2d is flattened row by row.
PARAMS = {
    "table": TENSORS["table"],
    "layers": {
        "kernel": np.stack([TENSORS[f"layers.{i}.weight"].T for i in range(LAYERS)]),
        "scale": np.stack([TENSORS[f"layers.{i}.scale"] for i in range(LAYERS)]),
    },
    "patch": {
        "kernel": np.array([TENSORS["patch.weight"][:, c, y, x] for y in range(2) for x in range(2) for c in range(3)])
    },
}


def open_files(folder, tensors=None, dtype=np.float32):
    tensors = {key: np.asarray(value, dtype) for key, value in (tensors or TENSORS).items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return TensorFiles(folder)


def abstract(dtype=jnp.float32, **changes):
    """Returns shapes and dtypes of `PARAMS`; `changes` are arrays whose shapes replace those of their names."""
    shapes = {key: jax.ShapeDtypeStruct(value.shape, dtype) for key, value in changes.items()}
    return {**jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), PARAMS), **shapes}


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_are_converted_to_the_requested_dtype(tmp_path, stored, dtype):
    params = convert.load_params(open_files(tmp_path, dtype=stored), ROWS, abstract(dtype), source=tmp_path)
    expected = jax.tree.map(lambda leaf: leaf.astype(stored).astype(dtype), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert all(leaf.dtype == dtype and leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(params))


def test_sharded_parameters_have_the_requested_sharding_and_the_same_values(tmp_path):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    specs = {
        "table": P("tensor", "fsdp"),
        "layers": {"kernel": P(None, "fsdp", "tensor"), "scale": P()},
        "patch": {"kernel": P("fsdp", "tensor")},
    }
    sharded = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=NamedSharding(mesh, spec)),
        PARAMS,
        specs,
    )
    params = convert.load_params(open_files(tmp_path), ROWS, sharded, source=tmp_path)
    for array, expected, spec in zip(
        jax.tree.leaves(params), jax.tree.leaves(PARAMS), jax.tree.leaves(specs), strict=True
    ):
        assert array.sharding == NamedSharding(mesh, spec)
        np.testing.assert_array_equal(array, expected.astype(np.float32))


def test_each_shard_allocates_only_its_part(tmp_path):
    """Buffers have the size of a shard, so a sharded matrix is never assembled on the host."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    sharding = NamedSharding(mesh, P("fsdp"))
    calls = []
    original, convert._aligned_empty = convert._aligned_empty, lambda *args: calls.append(args) or original(*args)
    try:
        tree = {"w": jax.ShapeDtypeStruct((200, 4), jnp.float32, sharding=sharding)}
        files = open_files(tmp_path, {"w": np.ones((4, 200))})
        convert.load_params(files, [Row("w", "w", TRANSPOSED)], tree, source=tmp_path)
    finally:
        convert._aligned_empty = original
    assert [shape for shape, _ in calls] == [(50, 4)] * 4  # Replicas along `tensor` share a buffer.


def test_on_a_cpu_the_buffer_becomes_the_parameter(tmp_path):
    """XLA uses the memory instead of copying it, which keeps the peak at the size of the parameters."""
    addresses = []
    original = convert._aligned_empty

    def recording_empty(shape, dtype):
        array = original(shape, dtype)
        addresses.append(array.ctypes.data)
        return array

    convert._aligned_empty = recording_empty
    try:
        params = convert.load_params(open_files(tmp_path), ROWS, abstract(), source=tmp_path)
    finally:
        convert._aligned_empty = original
    assert sorted(addresses) == sorted(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params))


def test_a_table_grows_by_the_mean_of_its_rows(tmp_path):
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))  # The 10 old rows end within the third of four shards.
    table = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, P("tensor")))
    files = open_files(tmp_path)
    tree = {**abstract(), "table": table}
    grown = convert.load_params(files, ROWS, tree, source=tmp_path, grow=("table",))["table"]
    old = TENSORS["table"].astype(np.float32)
    np.testing.assert_array_equal(grown[:10], old)
    np.testing.assert_allclose(grown[10:], np.tile(old.mean(0), (6, 1)), rtol=1e-6)
    for options in ({}, {"grow": ("layers/kernel",)}):
        with pytest.raises(UserError, match=r"table has shape \[10, 8\], the config says \[16, 8\]"):
            convert.load_params(files, ROWS, tree, source=tmp_path, **options)
    smaller = abstract(table=np.zeros((9, 8)))
    with pytest.raises(UserError, match=r"table has shape \[10, 8\], the config says \[9, 8\]"):
        convert.load_params(files, ROWS, smaller, source=tmp_path, grow=("table",))


def test_keys_may_be_renamed_and_ignored(tmp_path):
    renamed = {f"model.{key}": tensor for key, tensor in TENSORS.items()} | {"other.head": np.ones(3)}
    params = convert.load_params(
        open_files(tmp_path, renamed),
        ROWS,
        abstract(),
        source=tmp_path,
        ignore=("other.",),
        rename=lambda key: key.removeprefix("model."),
    )
    np.testing.assert_array_equal(params["table"], PARAMS["table"].astype(np.float32))


def test_every_problem_is_reported_before_anything_is_read(tmp_path, monkeypatch):
    tensors = {key: np.asarray(value, np.float32) for key, value in TENSORS.items()}
    del tensors["layers.0.scale"], tensors["layers.2.scale"]
    tensors["layers.1.weight"] = np.zeros((200, 4), np.float32)
    tensors["table"] = np.zeros((10, 8), np.int8)
    # `rename` maps this key and patch.weight to the same name.
    tensors["model.patch.weight"] = tensors["patch.weight"].copy()
    tensors |= {"layers.3.scale": np.zeros(4, np.float32), "extra": np.zeros(1, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    # Calling either of these would raise a TypeError.
    monkeypatch.setattr(files, "read", None)
    monkeypatch.setattr(convert, "_aligned_empty", None)
    with pytest.raises(UserError) as error:
        convert.load_params(files, ROWS, abstract(), source="FOLDER", rename=lambda key: key.removeprefix("model."))
    assert str(error.value) == (
        "FOLDER: the tensors do not fit the config: layers.{0,2}.scale is missing; "
        "table has dtype int8, expected floating-point numbers of 16 bits or more; "
        "layers.1.weight has shape [200, 4], the config says [4, 200]; "
        "patch.weight appears twice, under different names; "
        "extra is not part of this model; layers.3.scale is not part of this model"
    )
