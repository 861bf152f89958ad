"""The geometry of a model: the settings that decide the shapes of its weights, or what the weights compute.

The other settings (arithmetic, kernels, memory) belong to a run, and may differ from those of the folder or checkpoint
that the weights come from.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import PARTS, AlignVLMConfig
from alignvlm_jax.models.language import LanguageConfig

SIZES = {
    "vision": ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"),
    "language": ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"),
}
"""The sizes of encoder and decoder. No model is complete without them."""

_RUN_FIELDS = ("dtype", "attention", "remat", "loss_memory_mib")
# Fields that describe the weights, but may have another value.
_FREE_FIELDS = ("max_position_embeddings", "vocab_scale_init")


def without_run_settings(model: AlignVLMConfig) -> AlignVLMConfig:
    """Returns the model with the default arithmetic, kernels and rematerialization."""
    parts = {}
    for name in SIZES:
        part = getattr(model, name)
        defaults = {field.name: field.default for field in dataclasses.fields(part) if field.name in _RUN_FIELDS}
        parts[name] = dataclasses.replace(part, **defaults)
    return dataclasses.replace(model, **parts)


def check_same_model(path: str, expected: Any, actual: Any, folder: str | Path) -> None:
    """Checks that a part of a model has the geometry of the weights in a folder.

    Args:
      path: key of the part in the config, for the message.
      expected: `VisionConfig`, `LanguageConfig` or connector config of the experiment.
      actual: the same of the folder.
      folder: name of the folder, for the message.

    Raises:
      UserError: if they differ; lists all differences.
    """
    if type(expected) is not type(actual):  # Only connectors can be of different types.
        raise UserError(f"{path} is {expected}, but {folder} has {actual}")
    # A head_dim of None means hidden_size / num_heads, so compare the resulting widths.
    if isinstance(expected, LanguageConfig):
        expected = dataclasses.replace(expected, head_dim=expected.head_width)
        actual = dataclasses.replace(actual, head_dim=actual.head_width)
    differences = [
        f"{field.name} {getattr(expected, field.name)!r} (the folder says {getattr(actual, field.name)!r})"
        for field in dataclasses.fields(expected)
        if field.name not in (*_RUN_FIELDS, *_FREE_FIELDS)
        and not _is_same(getattr(expected, field.name), getattr(actual, field.name))
    ]
    if differences:
        raise UserError(f"{path} is not the model in {folder}: {', '.join(differences)}")


def check_fits_checkpoint(model: AlignVLMConfig, source: AlignVLMConfig, checkpoint: str) -> None:
    """Checks that a run with this model can start from a checkpoint.

    Args:
      model: the model of the run.
      source: the model of the checkpoint.
      checkpoint: name of the checkpoint, for the message.

    Raises:
      UserError: if the checkpoint cannot be trained, or the models differ.
    """
    if (kept_words := getattr(source.connector, "kept_words", None)) is not None:
        raise UserError(
            f"config.init_from: {checkpoint} is pruned to {kept_words} words, and a pruned model cannot be trained: "
            "start from the full model, and prune it again afterwards"
        )
    if model.newline != source.newline:
        raise UserError(
            f"config.model.newline is {model.newline}, but {checkpoint} was trained "
            f"{'with' if source.newline else 'without'} a newline: use the tiling rule of that checkpoint"
        )
    for part in PARTS:
        check_same_model(f"config.model.{part}", getattr(model, part), getattr(source, part), checkpoint)


def is_same_number(first: Any, second: Any) -> bool:
    """Returns whether two numbers are equal in float32, such as 1e-5 and 9.999999747378752e-06.

    Models compute in float32 at most. A number that was once stored as float32 has other digits than the one that was
    written by hand.
    """
    is_float = type(first) is float and type(second) is float
    return first == second or (is_float and bool(np.float32(first) == np.float32(second)))


def _is_same(first: Any, second: Any) -> bool:
    """Returns whether two fields are equal, apart from rounding to float32."""
    if dataclasses.is_dataclass(first) and type(first) is type(second):
        pairs = zip(dataclasses.astuple(first), dataclasses.astuple(second), strict=True)
        return all(is_same_number(*pair) for pair in pairs)
    return is_same_number(first, second)
