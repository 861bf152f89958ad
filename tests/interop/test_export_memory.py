"""Peak memory of exporting an 8B model with random weights, which must be little more than one shard."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import flax.linen as nn
import ml_dtypes
import numpy as np
import pytest
import safetensors
import tensorstore
from flax.traverse_util import flatten_dict

from alignvlm_jax.config import load_config
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_to_json
from alignvlm_jax.interop.tensor_writer import MAX_SHARD_BYTES
from alignvlm_jax.models.alignvlm import AlignVLMConfig, parameter_shapes
from tests.interop.exported import make_checkpoint

_REPOSITORY = Path(__file__).parents[2]
_MAX_PEAK = MAX_SHARD_BYTES + 4 * 10**9
_CHUNK_ROWS = 16032  # rows per chunk of an embedding table; stacked weights have one layer per chunk


@pytest.fixture
def disk(tmp_path):
    """A temporary folder that is deleted after the test, because pytest keeps the folders of its last runs."""
    if shutil.disk_usage(tmp_path).free < 45 * 10**9:
        pytest.skip("needs 45 GB of disk")
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.large
def test_an_8b_model_is_exported_within_a_shard_and_4_gb(disk):
    config = load_config("configs/alignvlm_8b.py")
    shapes = _write_random_checkpoint(disk / "checkpoint", config)
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    start_time = time.monotonic()
    command = [sys.executable, "-m", "alignvlm_jax", "export"]
    command += ["--checkpoint", str(disk / "checkpoint"), "--out", str(disk / "out")]
    peak = _peak_anonymous_memory(command)
    seconds = time.monotonic() - start_time
    print(f"{total / 1e9:.1f} GB exported in {seconds:.0f} s; peak {peak / 1e9:.2f} GB of anonymous memory")

    index = json.loads((disk / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total > 16e9
    files = list((disk / "out").glob("*.safetensors"))
    assert all(file.stat().st_size < MAX_SHARD_BYTES + 10**6 for file in files)
    assert {file.name for file in files} == set(index["weight_map"].values())
    for key, path, layer in (
        ("model.language_model.layers.31.mlp.down_proj.weight", "language/layers/mlp/down/kernel", 31),
        ("model.vision_tower.vision_model.encoder.layers.26.mlp.fc1.weight", "vision/layers/mlp_in/kernel", 26),
    ):
        with safetensors.safe_open(disk / "out" / index["weight_map"][key], framework="np") as file:
            np.testing.assert_array_equal(file.get_tensor(key), _random_block(path, layer, shapes[path][1:]).T)
    assert peak < _MAX_PEAK


def _write_random_checkpoint(workdir: Path, config: ExperimentConfig) -> dict[str, tuple[int, ...]]:
    """Writes a bfloat16 checkpoint block by block, in the format of `checkpoints/arrays.py`; returns its shapes."""
    # A small checkpoint with the same tree is written first, then its arrays are replaced by large ones.
    make_checkpoint(workdir, tied=False, dtype="bfloat16")
    (workdir / "config.json").write_text(config_to_json(config))
    shapes = _shapes(config.model)
    for path, shape in shapes.items():
        base = {"driver": "file", "path": f"{workdir / 'checkpoints' / '7' / 'params'}/"}
        store = {
            "driver": "ocdbt",
            "base": base,
            "path": path.replace("/", "."),
            "config": {"max_inline_value_bytes": 1024},
            "target_data_file_size": 2**28,
        }
        stacked = "/layers/" in path
        rows = 1 if stacked else min(shape[0], _CHUNK_ROWS)
        metadata = {
            "shape": shape,
            "chunks": [rows, *shape[1:]],
            "dtype": "bfloat16",
            "compressor": {"id": "zstd", "level": 1},
            "dimension_separator": ".",
        }
        spec = {"driver": "zarr", "kvstore": store, "metadata": metadata}
        array = tensorstore.open(spec, create=True, delete_existing=True).result()
        for block, start in enumerate(range(0, shape[0], rows)):
            stop = min(start + rows, shape[0])
            size = shape[1:] if stacked else (stop - start, *shape[1:])
            array[start:stop].write(_random_block(path, block, size).reshape(stop - start, *shape[1:])).result()
    return shapes


def _shapes(config: AlignVLMConfig) -> dict[str, tuple[int, ...]]:
    boxed = parameter_shapes(config)
    return {path: leaf.shape for path, leaf in flatten_dict(nn.unbox(boxed), sep="/").items()}


def _random_block(path: str, block: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns random finite values: the highest bit of the exponent is 0, so none is infinite or NaN."""
    rng = np.random.default_rng([zlib.crc32(path.encode()), block])
    return (rng.integers(0, 2**16, shape, np.uint16) & 0xBFFF).view(ml_dtypes.bfloat16)


def _peak_anonymous_memory(command: list[str]) -> int:
    """Runs a command and returns its peak anonymous memory in bytes, sampled every 20 ms."""
    process = subprocess.Popen(command)
    peak, ended = 0, threading.Event()

    def sample():
        nonlocal peak
        while not ended.wait(0.02):
            status = Path(f"/proc/{process.pid}/status").read_text()
            match = re.search(r"RssAnon:\s+(\d+) kB", status)
            peak = max(peak, 1024 * int(match[1]) if match else 0)

    sampler = threading.Thread(target=sample)
    sampler.start()
    status = process.wait()
    ended.set()
    sampler.join()
    assert status == 0
    return peak
