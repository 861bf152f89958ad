"""The identity of a checkpoint: its folder and step, a digest of its weights, and whether it is pruned."""

import hashlib
import os
import pathlib
from typing import Any

from alignvlm_jax.backbones import trained_model
from alignvlm_jax.checkpoints.exported import is_alignvlm_folder
from alignvlm_jax.checkpoints.workdir import CHECKPOINTS_FOLDER, find_checkpoint, read_run_config
from alignvlm_jax.downloads.sources import model_source
from alignvlm_jax.interop.import_pytorch import read_alignvlm_config
from alignvlm_jax.locations import is_bucket


def locate(checkpoint: str | os.PathLike) -> tuple[pathlib.Path, int | None]:
    """Returns the folder and the step of a checkpoint, given as for `inference.reader.load`.

    The step is None for an exported folder, and the step of the checkpoint for the folder of a run.

    Raises:
      UserError: if there is no checkpoint.
    """
    folder = trained_model(checkpoint)
    return (folder, None) if is_alignvlm_folder(folder) else find_checkpoint(folder)


def identify(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """Returns the folder and step of a checkpoint, and a digest that changes with its weights."""
    folder, step = locate(checkpoint)
    name = str(folder if is_bucket(folder) else folder.resolve())
    digest = hashlib.sha256()
    if step is None:
        folder = model_source(folder)
        for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            # Weights may be gigabytes large. Their first and last MiB are enough to tell them apart.
            with file.open("rb") as content:
                digest.update(content.read(2**20))
                content.seek(max(0, file.stat().st_size - 2**20))
                digest.update(content.read(2**20))
        return {"checkpoint": name, "weights": digest.hexdigest()[:16]}
    # A run's checkpoint already has digests of all its files.
    for file in sorted((folder / CHECKPOINTS_FOLDER / str(step)).glob("digests.*.json")):
        digest.update(file.read_bytes())
    return {"checkpoint": name, "step": step, "weights": digest.hexdigest()[:16]}


def is_pruned(checkpoint: str | os.PathLike) -> bool:
    """Returns whether a checkpoint's connector is pruned to a part of the vocabulary."""
    folder, step = locate(checkpoint)
    config = read_alignvlm_config(folder) if step is None else read_run_config(folder)
    return getattr(config.model.connector, "kept_words", None) is not None
