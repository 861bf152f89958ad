"""A whole AlignVLM from two backbone folders and a fresh connector, built where it will live.

    params = assemble(config.model, "siglip/", "llama/", mesh=mesh)

Both folders are looked at, and all that is wrong with either is said, before a single weight is read. Then the weights
go one by one from the mapped files to their shards (`convert.py`), and ALIGN's W2 is copied from the LM head in place.

A vocabulary may be larger here than in the folder, for tokens that were added: their rows become the mean of the
others. ALIGN is not to speak of those tokens, so its own vocabulary stays at the folder's size.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, SingleDeviceSharding

from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import convert, huggingface
from alignvlm_jax.models.alignvlm import (
    AlignVLMConfig,
    Params,
    random_parameters,
    seed_connector,
    stored_dtypes,
)
from alignvlm_jax.models.connectors import AlignConfig, connector_spec
from alignvlm_jax.models.language import LanguageConfig
from alignvlm_jax.parallel import sharding

# How a model is run or was begun, not what it is: the config may say otherwise than the folder.
_FREE_FIELDS = ("dtype", "attention", "remat", "max_position_embeddings", "vocab_scale_init")
# What may have more rows than the folder's.
_GROWING = ("embedding", "lm_head")


def assemble(
    config: AlignVLMConfig,
    vision_folder: str | Path | None,
    language_folder: str | Path | None,
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> Params:
    """Builds the weights that stage 1 starts from.

    Args:
      config: the model; its parts must have the shapes of what is in the folders.
      vision_folder: a SigLIP folder; None draws random weights.
      language_folder: a Llama folder; None draws random weights.
      mesh: where to put the weights, sharded by `parallel/sharding.py`; None is the first device.
      dtype: of the weights.
      seed: of the connector, and of what else is drawn.

    Raises:
      UserError: config and folders do not fit, or a folder is damaged; all problems in one message.
    """
    abstract = abstract_parameters(config, mesh=mesh, dtype=dtype)
    rng = jax.random.key(seed)
    with contextlib.ExitStack() as stack:
        parts, problems = {}, []
        for name, folder, open_folder in (
            ("vision", vision_folder, huggingface.open_vision),
            ("language", language_folder, huggingface.open_language),
        ):
            try:
                if folder is not None:
                    backbone = stack.enter_context(open_folder(folder))
                    _check_fits(name, config, backbone)
                    parts[name] = backbone.match(abstract[name], grow=_GROWING)
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("; ".join(problems))
        params = {}
        for name, folder in (("vision", vision_folder), ("language", language_folder)):
            params[name] = convert.read(parts[name], folder) if folder else _draw(config, abstract[name], name, rng)
    connector = dict(abstract["connector"])
    # Parameters that follow from the language model need not be drawn: ALIGN's W2 is a copy of the LM head.
    seeded = {name: connector.pop(name) for name in connector_spec(config.connector).seeded}
    params["connector"] = _draw(config, connector, "connector", rng)
    if seeded:
        params["connector"] |= _compile(lambda params: seed_connector(config, params)["connector"], seeded)(params)
    return params


def abstract_parameters(config: AlignVLMConfig, *, mesh: Mesh | None = None, dtype: str = "float32") -> Params:
    """The shapes, dtypes and shardings of the weights; without a mesh all of them are on the first device."""
    boxed = jax.eval_shape(lambda: random_parameters(config, jax.random.key(0)))
    shapes = nn.unbox(boxed)
    if mesh is None:
        where = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        where = sharding.parameter_shardings(boxed, mesh)
    return jax.tree.map(
        lambda leaf, dtype, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
        shapes,
        stored_dtypes(shapes, dtype),
        where,
    )


def check_same_model(path: str, wanted: Any, found: Any, folder: str | Path) -> None:
    """Raises a `UserError` if a part of the config and the part in the folder have different shapes.

    Args:
      path: of the part in the config, for the message.
      wanted: the config's `VisionConfig`, `LanguageConfig` or connector config.
      found: the folder's.
      folder: for the message.
    """
    if type(wanted) is not type(found):  # connectors
        raise UserError(f"{path} is {wanted}, but {folder} has {found}")
    if isinstance(wanted, LanguageConfig):  # a head_dim of None and the width it stands for are the same
        wanted = dataclasses.replace(wanted, head_dim=wanted.head_width)
        found = dataclasses.replace(found, head_dim=found.head_width)
    differences = [
        f"{field.name} {getattr(wanted, field.name)!r} (the folder says {getattr(found, field.name)!r})"
        for field in dataclasses.fields(wanted)
        if field.name not in _FREE_FIELDS and getattr(wanted, field.name) != getattr(found, field.name)
    ]
    if differences:
        raise UserError(f"{path} is not the model in {folder}: {', '.join(differences)}")


def _check_fits(name: str, config: AlignVLMConfig, backbone: huggingface.Backbone) -> None:
    wanted, found = getattr(config, name), backbone.config
    if name == "language" and wanted.vocab_size > found.vocab_size:
        words, connector = found.vocab_size, config.connector
        if isinstance(connector, AlignConfig) and (connector.vocab_size or wanted.vocab_size) > words:
            raise UserError(
                f"config.model.connector.vocab_size: expected {words}, the words of {backbone.folder}: the rows that "
                f"config.model.language.vocab_size {wanted.vocab_size} adds are not words that ALIGN may use"
            )
        found = dataclasses.replace(found, vocab_size=wanted.vocab_size)
    check_same_model(f"config.model.{name}", wanted, found, backbone.folder)


def _draw(config: AlignVLMConfig, abstract: Params, part: str, rng: jax.Array) -> Params:
    """Random weights of one part. Nothing but what `abstract` has is asked for, so nothing else is drawn."""
    return _compile(lambda rng: nn.unbox(random_parameters(config, rng))[part], abstract)(rng)


def _compile(function, abstract: Params):
    """Jits `function` to give what `abstract` has of its output, in the dtypes and on the devices that it says."""
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def narrowed(*arguments):
        output = function(*arguments)
        output = {key: output[key] for key in abstract}
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), output, abstract)

    return jax.jit(narrowed, out_shardings=where)
