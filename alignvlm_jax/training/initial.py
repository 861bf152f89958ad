"""What stage 1 starts from: pre-trained backbones, a fresh connector, and ALIGN's W2 a copy of the LM head; or all the
weights of a checkpoint (`config.init_from`)."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from alignvlm_jax.backbones import backbone_folder
from alignvlm_jax.config import ExperimentConfig
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import huggingface
from alignvlm_jax.models.alignvlm import Params, random_parameters, seed_connector
from alignvlm_jax.parallel.mesh import make_mesh
from alignvlm_jax.training import checkpoint

# How a model is run or was begun, not what it is: the config may say otherwise than the folder.
_FREE_FIELDS = ("dtype", "remat", "max_position_embeddings", "vocab_scale_init")


def initial_parameters(config: ExperimentConfig) -> Params:
    """All weights before stage 1, float32; a function of the seed and of the backbones or checkpoint alone."""
    if config.init_from is not None:
        return _from_checkpoint(config)
    vision_folder = backbone_folder("vision", config.backbones.vision)
    vision_config, vision = huggingface.load_vision_folder(vision_folder)
    _must_agree("config.model.vision", config.model.vision, vision_config, vision_folder)
    language_folder = backbone_folder("language", config.backbones.language)
    language_config, language = huggingface.load_language_folder(language_folder)
    _must_agree("config.model.language", config.model.language, language_config, language_folder)
    # Only the connector is asked for, so only the connector is drawn.
    connector = jax.jit(lambda rng: nn.unbox(random_parameters(config.model, rng))["connector"])
    params = {"vision": vision, "connector": connector(jax.random.key(config.seed)), "language": language}
    return seed_connector(config.model, params)


def load_tokenizer(config: ExperimentConfig) -> ChatTokenizer:
    """The experiment's tokenizer, which must speak the language model's vocabulary."""
    if config.tokenizer is not None:
        folder = Path(config.tokenizer)
    elif config.init_from is not None:
        folder = checkpoint.find_checkpoint(config.init_from)[0] / checkpoint.TOKENIZER_FOLDER
    else:
        folder = backbone_folder("language", config.backbones.language)
    chat = ChatTokenizer.from_folder(folder)
    if chat.vocab_size > config.model.language.vocab_size:
        raise UserError(
            f"config.tokenizer: {folder} has {chat.vocab_size} tokens, "
            f"the language model only {config.model.language.vocab_size}"
        )
    return chat


def _from_checkpoint(config: ExperimentConfig) -> Params:
    """The checkpoint's weights, straight onto the run's mesh."""
    source = checkpoint.load_config(config.init_from).model
    for part in ("vision", "connector", "language"):
        _must_agree(f"config.model.{part}", getattr(config.model, part), getattr(source, part), config.init_from)
    return checkpoint.restore_params(config.init_from, make_mesh(config.mesh))


def _must_agree(path: str, wanted: Any, found: Any, folder: str | Path) -> None:
    """The model in the config and the one in the folder must be the same shape."""
    if type(wanted) is not type(found):  # connectors
        raise UserError(f"{path} is {wanted}, but {folder} has {found}")
    if hasattr(wanted, "head_dim"):  # None and the width it stands for are the same
        wanted = dataclasses.replace(wanted, head_dim=wanted.head_width)
        found = dataclasses.replace(found, head_dim=found.head_width)
    differences = [
        f"{field.name} {getattr(wanted, field.name)!r} (the folder says {getattr(found, field.name)!r})"
        for field in dataclasses.fields(wanted)
        if field.name not in _FREE_FIELDS and getattr(wanted, field.name) != getattr(found, field.name)
    ]
    if differences:
        raise UserError(f"{path} is not the model in {folder}: {', '.join(differences)}")
