"""Writing of safetensors for transformers, and failures that leave nothing behind."""

import errno
import json
import shutil
import tracemalloc
import types

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch

from alignvlm_jax.checkpoints.new_folder import new_folder
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import tensor_writer
from alignvlm_jax.interop.tensor_writer import TensorSpec, split_into_shards, write_tensors


def _spec(key, shape, dtype="float32"):
    return TensorSpec(key, shape, np.dtype(dtype))


def _arrays(specs):
    rng = np.random.default_rng(0)
    return {spec.key: rng.normal(size=spec.shape).astype(np.float32) for spec in specs}


def test_torch_reads_every_layout_and_dtype(tmp_path):
    specs = [_spec("a", (3, 5)), _spec("b", (4,), ml_dtypes.bfloat16), _spec("c", (2, 3), "float16")]
    arrays = _arrays(specs)
    # The file format has row-major tensors only.
    arrays["a"] = np.asfortranarray(arrays["a"])
    write_tensors(tmp_path, specs, lambda spec: arrays[spec.key])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {key: str(tensor.dtype) for key, tensor in tensors.items()} == {
        "a": "torch.float32",
        "b": "torch.bfloat16",
        "c": "torch.float16",
    }
    np.testing.assert_array_equal(tensors["a"].numpy(), arrays["a"])
    np.testing.assert_array_equal(
        tensors["b"].float().numpy(), arrays["b"].astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_contain_the_tensors_named_in_the_index(tmp_path):
    # A shard of 100 bytes holds 25 values; t2 is larger and gets a shard of its own.
    specs = [_spec(f"t{i}", (size,)) for i, size in enumerate((10, 10, 100, 5, 5))]
    arrays = _arrays(specs)
    write_tensors(tmp_path, specs, lambda spec: arrays[spec.key], max_shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 130
    by_file = {}
    for key, file in index["weight_map"].items():
        by_file.setdefault(file, set()).add(key)
    assert by_file == {
        "model-00001-of-00003.safetensors": {"t0", "t1"},
        "model-00002-of-00003.safetensors": {"t2"},
        "model-00003-of-00003.safetensors": {"t3", "t4"},
    }
    for file, keys in by_file.items():
        tensors = safetensors.torch.load_file(tmp_path / file)
        assert set(tensors) == keys
        assert all(np.array_equal(tensors[key].numpy(), arrays[key]) for key in keys)


def test_only_one_shard_is_held_at_a_time(tmp_path):
    """Of 20 tensors of 1 MB, two per file, memory holds at most those of one file and one tensor being converted."""
    specs = [_spec(f"t{i}", (500, 500)) for i in range(20)]
    tracemalloc.start()
    write_tensors(tmp_path, specs, lambda spec: np.ones(spec.shape, np.float32).T, max_shard_bytes=2 * 10**6)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 2 * 10**6 < peak < 4 * 10**6


def test_shards_are_filled_in_order():
    specs = [_spec(key, (1,)) for key in "abcde"]
    assert [[spec.key for spec in shard] for shard in split_into_shards(specs, 8)] == [["a", "b"], ["c", "d"], ["e"]]


def test_too_little_disk_space_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_writer.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10))
    with pytest.raises(UserError, match="are free"):
        write_tensors(tmp_path, [_spec("a", (3,))], lambda spec: pytest.fail("no tensor must be read"))


def test_values_beyond_float16_are_refused(tmp_path):
    with pytest.raises(UserError, match="a has values that float16 cannot hold: choose bfloat16"):
        write_tensors(tmp_path, [_spec("a", (2,), "float16")], lambda spec: np.array([1.0, 1e6], np.float32))


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), safetensors.SafetensorError("I/O error: no space")],
)
def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, monkeypatch, failure):
    def fail(*arguments, **keywords):
        raise failure

    monkeypatch.setattr(tensor_writer.safetensors.numpy, "save_file", fail)
    with pytest.raises(UserError, match="cannot be written"):
        with new_folder(tmp_path / "out") as folder:
            write_tensors(folder, [_spec("a", (3,))], lambda spec: np.zeros(3, np.float32))
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_only_empty_folders_are_accepted(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    with pytest.raises(UserError, match="not empty"), new_folder(tmp_path / "full"):
        pytest.fail("the block must not run")
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "empty" / "file").read_text() == "x"
    shutil.rmtree(tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
