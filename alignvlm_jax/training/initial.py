"""Loads the weights and the tokenizer that stage 1 starts with.

The weights are pre-trained backbones and a fresh connector, with ALIGN's W2 as a copy of the LM head; or all the
weights of a checkpoint (`config.init_from`).
"""

import json
from pathlib import Path

from jax.sharding import Mesh

from alignvlm_jax.backbones import backbone_folder, is_random
from alignvlm_jax.checkpoints import weights
from alignvlm_jax.checkpoints.workdir import TOKENIZER_FOLDER, find_checkpoint, read_run_config
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.geometry import check_fits_checkpoint
from alignvlm_jax.data.chat import CONFIG_FILE, ChatTokenizer, special_names
from alignvlm_jax.downloads.sources import model_source
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import assemble
from alignvlm_jax.interop.tokenizer import import_tokenizer
from alignvlm_jax.models.alignvlm import Params
from alignvlm_jax.parallel import distributed
from alignvlm_jax.parallel.mesh import make_mesh


def initial_parameters(config: ExperimentConfig, mesh: Mesh | None = None) -> Params:
    """Returns all weights before stage 1, in float32.

    They depend only on the seed and on the backbones or the checkpoint.

    Args:
      config: the experiment.
      mesh: devices to place the weights on; None makes the config's mesh over all devices.
    """
    mesh = mesh or make_mesh(config.mesh)
    if config.init_from is not None:
        return _from_checkpoint(config, mesh)
    names = {"vision": config.backbones.vision, "language": config.backbones.language}
    names = {part: name for part, name in names.items() if not is_random(name)}
    is_quiet = not distributed.is_primary()
    # A backbone that cannot be read is reported before gigabytes of the other one are downloaded.
    for part, name in names.items():
        backbone_folder(part, name, with_weights=False, is_quiet=True)
    found = {part: backbone_folder(part, name, is_quiet=is_quiet) for part, name in names.items()}
    folders = [found.get(part) for part in ("vision", "language")]
    return assemble.assemble(config.model, *folders, mesh=mesh, seed=config.seed, log=distributed.log)


def load_tokenizer(config: ExperimentConfig) -> ChatTokenizer:
    """Returns the experiment's tokenizer.

    Raises:
      UserError: if it needs more rows than the language model's vocabulary has.
    """
    # In order of precedence: a folder named by the config, the checkpoint's tokenizer, the decoder's tokenizer.
    if config.tokenizer is not None:
        folder = model_source(config.tokenizer, with_weights=False, is_quiet=True)
    elif config.init_from is not None:
        folder = find_checkpoint(config.init_from)[0] / TOKENIZER_FOLDER
    else:
        name = config.backbones.language
        name = "nano" if is_random(name) else name
        folder = backbone_folder("language", name, with_weights=False, is_quiet=True)
    rows = config.model.language.vocab_size
    if _has_image_token(folder):
        chat = ChatTokenizer.from_folder(folder)
        needed = chat.vocab_size
    else:
        # This is the tokenizer of a text-only model, so add an image token and a chat template for images.
        chat, needed, _ = import_tokenizer(folder, num_embeddings=rows)
    if needed > rows:
        raise UserError(
            f"config.model.language.vocab_size: the tokenizer in {folder} needs {needed} rows, the config has {rows}. "
            f"To add tokens to a language model, set it to {needed}, and config.model.connector.vocab_size to {rows}"
        )
    return chat


def _has_image_token(folder: Path) -> bool:
    """Returns whether the tokenizer in the folder names an image token, as in vision-language models."""
    try:
        return "image_token" in special_names(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def _from_checkpoint(config: ExperimentConfig, mesh: Mesh) -> Params:
    """Restores the checkpoint's weights onto the mesh of the run."""
    check_fits_checkpoint(config.model, read_run_config(config.init_from).model, config.init_from)
    return weights.restore_params(config.init_from, mesh)
