"""Makes tiny checkpoints for tests of export and import, with random weights and the nano tokenizer."""

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from alignvlm_jax.backbones import backbone_folder
from alignvlm_jax.checkpoints.weights import ParameterReader, write_checkpoint
from alignvlm_jax.checkpoints.workdir import Progress
from alignvlm_jax.config import load_config
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_from_dict, config_to_dict
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.models.alignvlm import AlignVLMConfig, Params, parameter_shapes
from alignvlm_jax.parallel import sharding

CONNECTORS = {
    "align": {"vocab_size": 480},
    "mlp": {},
    "ovis": {"num_words": 24},
    "h_reducer": {"window": 3},
    "c_abstractor": {"num_tokens": 4, "depth": 2, "hidden_size": 8},
    "perceiver": {"num_latents": 3, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
}

PROGRESS = Progress(step=7, stage=1, step_in_stage=3, train_seconds=1.5)
HISTORY = [{"what": "joined by a test", "vision": "siglip-x", "language": "llama-y"}]


def tiny_config(connector: str = "align", *, tied: bool = True) -> ExperimentConfig:
    """Returns the nano experiment with a model of a few thousand weights."""
    raw = config_to_dict(load_config("configs/nano.py"))
    raw["model"]["vision"] |= {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 2,
        "num_heads": 2,
    }
    raw["model"]["language"] |= {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "tie_word_embeddings": tied,
        "rope_scaling": {"original_max_position_embeddings": 64},
    }
    raw["model"]["connector"] = {"name": connector, **CONNECTORS[connector]}
    raw["data"]["tiling"] |= {"tile_size": 16, "max_tiles": 3, "thumbnail": True}
    return config_from_dict(raw)


def random_params(config: AlignVLMConfig, *, dtype: str = "float32", mesh: Mesh | None = None) -> Params:
    """Returns random weights, also for norms and biases, whose initial ones and zeros would hide mistakes."""
    boxed = parameter_shapes(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (0.3 * rng.normal(size=leaf.shape) + (leaf.ndim == 1)).astype(dtype), nn.unbox(boxed)
    )
    return jax.device_put(params, None if mesh is None else sharding.parameter_shardings(boxed, mesh))


def nano_tokenizer() -> ChatTokenizer:
    return ChatTokenizer.from_folder(backbone_folder("language", "nano"))


def make_checkpoint(
    workdir: Path, connector: str = "align", *, tied: bool = True, dtype: str = "float32", mesh: Mesh | None = None
) -> Path:
    """Writes a checkpoint of `tiny_config` with random weights; returns its folder."""
    config = tiny_config(connector, tied=tied)
    params = random_params(config.model, dtype=dtype, mesh=mesh)
    write_checkpoint(workdir, config, params, nano_tokenizer(), history=HISTORY, progress=PROGRESS, page_scale=0.5)
    return workdir


def read_weights(checkpoint: Path) -> dict[str, np.ndarray]:
    """Returns the weights of a checkpoint by their paths."""
    reader = ParameterReader(checkpoint)
    return {path: reader.read(path) for path in reader.shapes}


def assert_same_weights(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    """Asserts that names, dtypes and bits are equal."""
    assert {name: array.dtype for name, array in left.items()} == {name: array.dtype for name, array in right.items()}
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)
