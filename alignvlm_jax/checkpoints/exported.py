"""Recognizes the folders that `tools/export_pytorch.py` writes."""

import json
from pathlib import Path


def is_alignvlm_folder(folder: str | Path) -> bool:
    """Returns whether `folder` is an exported folder (read with `read_alignvlm`) and not the workdir of a run."""
    try:
        return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type") == "alignvlm"
    except (OSError, ValueError, AttributeError):
        return False
