"""Finds backbones, including the nano backbones: a small SigLIP encoder and a small Llama decoder in this package.

AlignVLM aligns a trained vision encoder with a trained language model, so both must exist first. The nano backbones
stand in for SigLIP and Llama in runs that must fit on a laptop. `make backbones` trains them again; `nano/README.md` is
their model card.

`NANO_MODEL` is the folder of the two backbones joined by ALIGN and trained by the demo, as `tools/export_pytorch.py`
writes it, but without code.
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
    """Returns the Hugging Face folder of a backbone.

    Args:
      kind: "vision" or "language".
      name: "nano" for the shipped backbone, "nano-transcription" for the shipped encoder that was trained without
        labels per patch, otherwise a path.

    Raises:
      UserError: if the folder does not exist or holds no config.json.
    """
    folder = _SHIPPED.get((kind, name), Path(name))
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is not a {kind} backbone: it needs a Hugging Face config.json and model.safetensors "
            "('nano' is the shipped backbone)"
        )
    return folder


def trained_model(checkpoint: str | os.PathLike) -> Path:
    """Returns the folder of a checkpoint; "nano" is the model in the package, unless a file or folder has that name."""
    return NANO_MODEL if os.fspath(checkpoint) == "nano" and not os.path.exists("nano") else Path(checkpoint)
