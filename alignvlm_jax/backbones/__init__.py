"""Finds backbones, including the nano backbones: a small SigLIP encoder and a small Llama decoder in this package.

AlignVLM aligns a trained vision encoder with a trained language model, so both must exist first. The nano backbones
stand in for SigLIP and Llama in runs that must fit on a laptop. `make backbones` trains them again; `nano/README.md` is
their model card.

`NANO_MODEL` is the folder of the two backbones joined by ALIGN and trained by the demo, as `alignvlm export`
writes it, but without code.
"""

import os
from pathlib import Path

from alignvlm_jax.downloads.contents import describe_adapter
from alignvlm_jax.downloads.sources import model_source
from alignvlm_jax.downloads.stubs import describe_stub
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import is_bucket, open_location

_NANO = Path(__file__).parent / "nano"
NANO_MODEL = _NANO / "model"

RANDOM = "random"
"""Name of random weights of the configured shape, to try a config out. "random:NAME" takes the shape of NAME.

With a random decoder and no `config.tokenizer`, the nano decoder's tokenizer is used.
"""

_SHIPPED = {
    ("vision", "nano"): _NANO / "vision",
    ("vision", "nano-transcription"): _NANO / "vision_transcription",
    ("language", "nano"): _NANO / "language",
}


def is_random(name: str) -> bool:
    """Returns whether the name of a backbone stands for random weights."""
    return name.partition(":")[0] == RANDOM


def backbone_folder(kind: str, name: str, *, with_weights: bool = True, is_quiet: bool = False) -> Path:
    """Returns the Hugging Face folder of a backbone, after downloading it if it is on the Hub.

    Args:
      kind: "vision" or "language".
      name: "nano" for the shipped backbone, "nano-transcription" for the shipped encoder that was trained without
        labels per patch; otherwise a folder, or a name on the Hub (`downloads/sources.py`).
      with_weights: whether the weights are needed, and not only the config and the tokenizer.
      is_quiet: whether to print nothing about downloads.

    Raises:
      UserError: if the folder does not exist or holds no config.json, or the model on the Hub cannot be read.
    """
    shipped = _SHIPPED.get((kind, name))
    folder = shipped or model_source(name, with_weights=with_weights, is_quiet=is_quiet)
    if (folder / "config.json").is_file():
        return folder
    reason = describe_stub(folder / "config.json")
    if reason and (folder / "config.json").is_symlink():
        raise UserError(f"{folder / 'config.json'} {reason}")
    if adapter := describe_adapter(folder):
        raise UserError(f"{folder}: {adapter}")
    raise UserError(
        f"{folder} is not a {kind} backbone: it needs a Hugging Face config.json and model.safetensors "
        "('nano' is the shipped backbone, ORGANIZATION/NAME is one on the Hub)"
    )


def trained_model(checkpoint: str | os.PathLike) -> Path:
    """Returns the folder of a checkpoint.

    "nano" is the model in the package, unless a file or folder has that name. An exported model may also be named by
    any of its folders in the cache of the Hub, or by its name on the Hub.
    """
    if is_bucket(checkpoint):
        return open_location(checkpoint)
    text = os.fspath(checkpoint)
    if text == "nano" and not os.path.exists("nano"):
        return NANO_MODEL
    # A mistyped folder of a run looks like a name on the Hub, but its parent exists here.
    is_mistyped = "://" not in text and not os.path.lexists(text) and Path(text).parent.exists()
    return Path(text) if is_mistyped else model_source(checkpoint)
