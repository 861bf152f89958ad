"""Recognizes the folders that `tools/export_pytorch.py` writes."""

import json
from pathlib import Path


def is_alignvlm_folder(folder: str | Path) -> bool:
    """Whether `read_alignvlm` is the one to read it: an exported folder, not a training run's workdir."""
    try:
        return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type") == "alignvlm"
    except (OSError, ValueError, AttributeError):
        return False
