"""The nano backbones: a small SigLIP encoder and a small Llama decoder shipped with the package, and how they are made.

They stand in for SigLIP and Llama where a run must fit a laptop: AlignVLM aligns a model that sees with a model that
speaks, so the two have to exist first. `make backbones` makes them again; `nano/README.md` is their card.

`NANO_MODEL` is the two joined by ALIGN and trained by the demo: what `tools/export_pytorch.py` writes, less its code.
"""

import os
from pathlib import Path

from alignvlm_jax.errors import UserError

_NANO = Path(__file__).parent / "nano"
NANO_MODEL = _NANO / "model"

_SHIPPED = {
    ("vision", "nano"): _NANO / "vision",
    ("vision", "nano-transcription"): _NANO / "vision_transcription",
    ("language", "nano"): _NANO / "language",
}


def backbone_folder(kind: str, name: str) -> Path:
    """The folder of a backbone in Hugging Face layout.

    Args:
      kind: "vision" or "language".
      name: "nano" for the shipped one, "nano-transcription" for the shipped encoder that never saw labels per patch,
        else a path.

    Raises:
      UserError: no such folder.
    """
    folder = _SHIPPED.get((kind, name), Path(name))
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is not a {kind} backbone: it needs a Hugging Face config.json and model.safetensors "
            "('nano' names the shipped one)"
        )
    return folder


def trained_model(checkpoint: str | os.PathLike) -> Path:
    """The folder of a checkpoint: "nano", where nothing here has that name, is the model shipped with the package."""
    return NANO_MODEL if os.fspath(checkpoint) == "nano" and not os.path.exists("nano") else Path(checkpoint)
