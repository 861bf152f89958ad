"""Reading of safetensors: complete tensors, slices, and files that are refused."""

import json
import re
import shlex
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from alignvlm_jax.downloads.contents import INDEX_FILE, WEIGHTS_FILE
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop.tensor_reader import TensorFiles

RNG = np.random.default_rng(0)
TENSORS = {
    "a.weight": RNG.normal(size=(6, 4)).astype(ml_dtypes.bfloat16),
    "b.weight": RNG.normal(size=(2, 3, 5)).astype(np.float32),
    "b.bias": RNG.normal(size=(7,)).astype(np.float16),
    "empty": np.zeros((0, 3), np.float32),
    "count": np.array(12, np.int64),
}


def save(folder, name, keys=tuple(TENSORS)):
    safetensors.numpy.save_file({key: TENSORS[key] for key in keys}, folder / name)


def save_shards(folder, **weight_map):
    """Writes two shards and their index, to which `weight_map` is added."""
    save(folder, "one.safetensors", ("a.weight", "count"))
    save(folder, "two.safetensors", ("b.weight", "b.bias", "empty"))
    correct_map = {key: "one.safetensors" if key in ("a.weight", "count") else "two.safetensors" for key in TENSORS}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": {**correct_map, **weight_map}}))


@pytest.mark.parametrize("write", [lambda folder: save(folder, WEIGHTS_FILE), save_shards])
def test_tensors_and_slices_are_read(tmp_path, write):
    write(tmp_path)
    with TensorFiles(tmp_path) as files:
        assert files.shapes == {key: tensor.shape for key, tensor in TENSORS.items()}
        assert files.dtypes == {key: tensor.dtype for key, tensor in TENSORS.items()}
        for key, tensor in TENSORS.items():
            np.testing.assert_array_equal(files.read(key), tensor)
        np.testing.assert_array_equal(
            files.read("b.weight", (1, slice(None), slice(1, 4))), TENSORS["b.weight"][1, :, 1:4]
        )
        assert files.read("a.weight", 2).shape == (4,)


def test_views_outlive_the_files_and_are_read_only(tmp_path):
    save(tmp_path, WEIGHTS_FILE)
    with TensorFiles(tmp_path) as files:
        view = files.read("a.weight")
    np.testing.assert_array_equal(view, TENSORS["a.weight"])
    with pytest.raises(ValueError, match="read-only"):
        view[...] = 0


def test_reading_allocates_no_memory(tmp_path):
    big = np.ones((64, 2**18), np.float32)  # 64 MB
    safetensors.numpy.save_file({"big": big}, tmp_path / WEIGHTS_FILE)
    program = """
import sys
from alignvlm_jax.interop.tensor_reader import TensorFiles
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
files, before = TensorFiles(sys.argv[1]), anonymous()
tensor = files.read("big")
total = sum(float(tensor[row, ::1024].sum()) for row in range(64))
print(total, anonymous() - before)
"""
    run = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    total, megabytes = map(float, run.stdout.split())
    # Every page of the 64 MB was touched. Memory-mapped pages of a file do not count as anonymous memory.
    assert total == 64 * 2**8 and megabytes < 8


def test_unaligned_tensors_are_read(tmp_path):
    """The format does not guarantee that tensors are aligned to their item size; an odd header shifts them."""
    data = TENSORS["b.weight"].tobytes()
    header = json.dumps({"b.weight": {"dtype": "F32", "shape": [2, 3, 5], "data_offsets": [0, len(data)]}}).encode()
    header += b" " * (1 - len(header) % 2)
    (tmp_path / WEIGHTS_FILE).write_bytes(len(header).to_bytes(8, "little") + header + data)
    np.testing.assert_array_equal(TensorFiles(tmp_path).read("b.weight"), TENSORS["b.weight"])


def test_folders_without_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        TensorFiles(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no weights: neither model.safetensors nor"):
        TensorFiles(tmp_path)


# Cut off within the length of the header, within the header, and within the last tensor; and an empty file.
@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    save(tmp_path, WEIGHTS_FILE)
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        UserError, match="model.safetensors is (empty|damaged, truncated or not safetensors .*): download it again"
    ):
        TensorFiles(tmp_path)


def test_all_problems_of_shards_are_reported_together(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()
    save(elsewhere, "secret.safetensors", ("b.bias",))
    # A header of 16 bytes is announced, and two follow.
    (folder / "short.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    # Each of these keys points to another kind of wrong file, and one shard more than the index names has `count`.
    save_shards(
        folder,
        up="../elsewhere/secret.safetensors",
        sideways="sub/../../elsewhere/secret.safetensors",
        absolute=str(elsewhere / "secret.safetensors"),
        gone="gone.safetensors",
        cut="short.safetensors",
        misplaced="one.safetensors",
    )
    save(folder, "three.safetensors", ("count",))
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["again"] = "three.safetensors"
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(UserError) as error:
        TensorFiles(folder)
    report = str(error.value)
    assert report.count("points outside the folder") == 3
    for name in ("'../elsewhere/", "'sub/../../elsewhere/", f"'{elsewhere}"):
        assert f"to {name}" in report
    assert "gone.safetensors is missing" in report
    assert "short.safetensors is damaged" in report
    assert "says misplaced is in one.safetensors, which does not contain it" in report
    assert "count is in three.safetensors and in another file as well" in report


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    save_shards(snapshot)
    for path in list(snapshot.iterdir()):
        path.rename(blobs / f"hash-{path.name}")
        path.symlink_to(f"../../blobs/hash-{path.name}")
    assert set(TensorFiles(snapshot).shapes) == set(TENSORS)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_files_that_are_not_an_index_are_refused(tmp_path, text):
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(UserError, match="is not an index of safetensors"):
        TensorFiles(tmp_path)


class CreatesFileWhenUnpickled:
    """Shows that unpickling executes code: it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_weights_are_refused_without_unpickling(tmp_path):
    torch.save({"a.weight": CreatesFileWhenUnpickled(tmp_path / "unpickled")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled .pytorch_model.bin"):
        TensorFiles(tmp_path)
    assert not (tmp_path / "unpickled").exists()


def test_the_suggested_command_converts_pickled_weights(tmp_path):
    folder = tmp_path / "with a space"
    folder.mkdir()
    table = torch.arange(12.0).reshape(3, 4)
    torch.save({"embed.weight": table, "head.weight": table}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"transposed": table.T.bfloat16()}, folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(UserError) as error:
        TensorFiles(folder)
    command = shlex.split(re.search(r"convert them with: (python .*)$", str(error.value)).group(1))
    subprocess.run([sys.executable, *command[1:]], check=True)
    files = TensorFiles(folder)
    np.testing.assert_array_equal(files.read("head.weight"), table.numpy())
    np.testing.assert_array_equal(files.read("transposed").astype(np.float32), table.T.numpy())
