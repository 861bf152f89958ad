"""Finds backbones, including the nano backbones: a small SigLIP encoder and a small Llama decoder in this package.

AlignVLM aligns a trained vision encoder with a trained language model, so both must exist first. The nano backbones
stand in for SigLIP and Llama in runs that must fit on a laptop. `make backbones` trains them again; `nano/README.md` is
their model card.

`NANO_MODEL` is the folder of the two backbones joined by ALIGN and trained by the demo, as `alignvlm export`
writes it, but without code.
"""

import os
import re
from pathlib import Path

from alignvlm_jax.downloads.contents import describe_adapter
from alignvlm_jax.downloads.hub_cache import snapshot_folder
from alignvlm_jax.downloads.stubs import describe_stub
from alignvlm_jax.errors import UserError

_NANO = Path(__file__).parent / "nano"
NANO_MODEL = _NANO / "model"

# A name on the Hub: organization and model.
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
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
        labels per patch, otherwise a path; in the cache of the Hub, also the model's folder above its revisions.

    Raises:
      UserError: if the folder does not exist or holds no config.json.
    """
    folder = _SHIPPED.get((kind, name)) or snapshot_folder(name)
    if (folder / "config.json").is_file():
        return folder
    if not folder.exists() and _REPOSITORY.fullmatch(name):
        raise UserError(
            f"{name}: no such folder. If it is a model on the Hub, download it first: hf download {name} --local-dir "
            f"{folder.name}"
        )
    reason = describe_stub(folder / "config.json")
    if reason and (folder / "config.json").is_symlink():
        raise UserError(f"{folder / 'config.json'} {reason}")
    if adapter := describe_adapter(folder):
        raise UserError(f"{folder}: {adapter}")
    raise UserError(
        f"{folder} is not a {kind} backbone: it needs a Hugging Face config.json and model.safetensors "
        "('nano' is the shipped backbone)"
    )


def trained_model(checkpoint: str | os.PathLike) -> Path:
    """Returns the folder of a checkpoint.

    "nano" is the model in the package, unless a file or folder has that name. A model in the cache of the Hub may be
    named by any of its folders.
    """
    is_nano = os.fspath(checkpoint) == "nano" and not os.path.exists("nano")
    return NANO_MODEL if is_nano else snapshot_folder(checkpoint)
