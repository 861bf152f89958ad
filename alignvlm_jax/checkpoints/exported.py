"""Recognizes the folders that `alignvlm export` writes."""

import json
from pathlib import Path

from alignvlm_jax.locations import open_location
from alignvlm_jax.storage.errors import translated_errors


def is_alignvlm_folder(folder: str | Path) -> bool:
    """Returns whether `folder` is an exported folder (read with `read_alignvlm`) and not the workdir of a run."""
    return model_type(folder) == "alignvlm"


def model_type(folder: str | Path) -> str | None:
    """Returns the type of the model in a Hugging Face folder; None if `config.json` names none."""
    try:
        with translated_errors(str(folder)):
            content = (open_location(folder) / "config.json").read_bytes().decode("utf-8-sig")
        return json.loads(content).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
