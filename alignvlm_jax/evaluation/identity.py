"""Which model a checkpoint is: where it lies, a digest of its weights, whether it is pruned."""

import hashlib
import os
import pathlib
from typing import Any

from alignvlm_jax.backbones import trained_model
from alignvlm_jax.checkpoints.exported import is_alignvlm_folder
from alignvlm_jax.checkpoints.workdir import CHECKPOINTS_FOLDER, find_checkpoint, read_run_config
from alignvlm_jax.interop.import_pytorch import read_alignvlm_config


def locate(checkpoint: str | os.PathLike) -> tuple[pathlib.Path, int | None]:
    """The folder of a checkpoint, as `inference.reader.load` takes it, and its step: a workdir's, None where exported.

    Raises:
      UserError: there is none.
    """
    folder = trained_model(checkpoint)
    return (folder, None) if is_alignvlm_folder(folder) else find_checkpoint(folder)


def identify(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """Which weights a checkpoint has: where they are, and a digest that changes when they do."""
    folder, step = locate(checkpoint)
    digest = hashlib.sha256()
    if step is None:
        for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as content:  # Gigabytes are told apart by both ends.
                digest.update(content.read(2**20))
                content.seek(max(0, file.stat().st_size - 2**20))
                digest.update(content.read(2**20))
        return {"checkpoint": str(folder.resolve()), "weights": digest.hexdigest()[:16]}
    for file in sorted((folder / CHECKPOINTS_FOLDER / str(step)).glob("digests.*.json")):
        digest.update(file.read_bytes())
    return {"checkpoint": str(folder.resolve()), "step": step, "weights": digest.hexdigest()[:16]}


def is_pruned(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint's connector is pruned to the words that it uses."""
    folder, step = locate(checkpoint)
    config = read_alignvlm_config(folder) if step is None else read_run_config(folder)
    return getattr(config.model.connector, "kept_words", None) is not None
