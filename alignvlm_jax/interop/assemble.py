"""Builds an AlignVLM from two backbone folders and a freshly initialized connector, directly on its devices.

    params = assemble(config.model, "siglip/", "llama/", mesh=mesh)

Both folders are checked, and all their problems reported, before any weight is read. Then the weights are copied one by
one from the mapped files to their shards (`convert.py`), and ALIGN's W2 is copied on the devices from the LM head.

The vocabulary of the model may be larger than that of the folder, for added tokens. Their rows are the mean of the
other rows. ALIGN must not use these tokens, so its own vocabulary keeps the size of the folder's.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
from jax.sharding import Mesh, SingleDeviceSharding

from alignvlm_jax.config.geometry import check_same_model
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import convert, huggingface
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import (
    AlignVLMConfig,
    Params,
    parameter_shapes,
    random_parameters,
    seed_connector,
    stored_dtypes,
)
from alignvlm_jax.models.connectors import AlignConfig, connector_spec
from alignvlm_jax.parallel import sharding

# Parameters that may have more rows than in the folder, for added tokens.
_GROWING = ("embedding", "lm_head")


@ordinary_modes()
def assemble(
    config: AlignVLMConfig,
    vision_folder: str | Path | None,
    language_folder: str | Path | None,
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> Params:
    """Builds the initial weights of stage 1.

    Args:
      config: model config; its parts must have the shapes of the models in the folders.
      vision_folder: a SigLIP folder; None draws random weights.
      language_folder: a Llama folder; None draws random weights.
      mesh: devices for the weights, sharded by `parallel/sharding.py`; None is the first device.
      dtype: dtype of the weights.
      seed: seed of the connector and of all other random weights.
      log: called with a sentence about each set of weights in a folder that is not read.

    Raises:
      UserError: if the config and a folder do not fit, or a folder is damaged; lists all problems.
    """
    abstract = abstract_parameters(config, mesh=mesh, dtype=dtype)
    rng = jax.random.key(seed)
    with contextlib.ExitStack() as stack:
        # Open and check both folders.
        matches, problems, notes = {}, [], []
        for name, folder, open_folder in (
            ("vision", vision_folder, huggingface.open_vision),
            ("language", language_folder, huggingface.open_language),
        ):
            try:
                if folder is not None:
                    backbone = stack.enter_context(open_folder(folder))
                    notes += backbone.files.notes
                    _check_fits(name, config, backbone)
                    matches[name] = backbone.match(abstract[name], grow=_GROWING)
            except UserError as error:
                problems.append(str(error))
        if problems:
            raise UserError("; ".join(problems))
        for note in notes:
            log(note)
        # Read or draw the weights of the backbones.
        params = {}
        for name, folder in (("vision", vision_folder), ("language", language_folder)):
            params[name] = convert.read(matches[name], folder) if folder else _draw(config, abstract[name], name, rng)
    connector = dict(abstract["connector"])
    # Weights that are computed from the language model are not drawn: ALIGN's W2 is a copy of the LM head.
    seeded = {name: connector.pop(name) for name in connector_spec(config.connector).seeded}
    params["connector"] = _draw(config, connector, "connector", rng)
    if seeded:
        params["connector"] |= _compile(lambda params: seed_connector(config, params)["connector"], seeded)(params)
    return params


@ordinary_modes()
def abstract_parameters(config: AlignVLMConfig, *, mesh: Mesh | None = None, dtype: str = "float32") -> Params:
    """Returns shapes, dtypes and shardings of the weights; without a mesh all of them are on the first device."""
    boxed = parameter_shapes(config)
    shapes = nn.unbox(boxed)
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        shardings = sharding.parameter_shardings(boxed, mesh)
    return jax.tree.map(
        lambda leaf, dtype, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
        shapes,
        stored_dtypes(shapes, dtype),
        shardings,
    )


def _check_fits(name: str, config: AlignVLMConfig, backbone: huggingface.Backbone) -> None:
    """Checks that a backbone has the shape given in the config, except for added tokens."""
    expected, actual = getattr(config, name), backbone.config
    if name == "language" and expected.vocab_size > actual.vocab_size:
        num_words, connector = actual.vocab_size, config.connector
        if isinstance(connector, AlignConfig) and (connector.vocab_size or expected.vocab_size) > num_words:
            raise UserError(
                f"config.model.connector.vocab_size: expected {num_words}, the vocabulary of {backbone.folder}: ALIGN "
                f"must not use the rows added by config.model.language.vocab_size {expected.vocab_size}"
            )
        actual = dataclasses.replace(actual, vocab_size=expected.vocab_size)
    check_same_model(f"config.model.{name}", expected, actual, backbone.folder)


def _draw(config: AlignVLMConfig, abstract: Params, part: str, rng: jax.Array) -> Params:
    """Draws the random weights of one part."""
    # Only the leaves of `abstract` are outputs, so the compiler removes the computation of all others.
    return _compile(lambda rng: nn.unbox(random_parameters(config, rng))[part], abstract)(rng)


def _compile(function, abstract: Params):
    """Jits `function`, restricted to the outputs that `abstract` names, with its dtypes and shardings."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def select(*arguments):
        output = function(*arguments)
        output = {key: output[key] for key in abstract}
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), output, abstract)

    return jax.jit(select, out_shardings=shardings)
