"""Reads and writes SigLIP and Llama folders in the layout of Hugging Face: `config.json` and safetensors.

    config, params = load_vision_folder("siglip/")        # VisionConfig, parameters of models.vision.VisionEncoder
    config, params = load_language_folder("llama/")       # LanguageConfig, parameters of models.language.LanguageModel

`assemble.py` builds a complete model from two folders; it opens both as `Backbone` and checks them before it reads any
weights. `huggingface_config.py` reads and writes the configs.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import convert, tables
from alignvlm_jax.interop.huggingface_config import (
    llama_config,
    read_language_config,
    read_vision_config,
    siglip_config,
)
from alignvlm_jax.interop.quantization import describe_quantized_tensors
from alignvlm_jax.interop.tensor_reader import TensorFiles
from alignvlm_jax.interop.tensor_writer import DTYPES, write_parameters
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.language import LanguageConfig, LanguageModel
from alignvlm_jax.models.vision import VisionConfig, VisionEncoder
from alignvlm_jax.models.weight_table import Row

Params = dict[str, Any]

# Tensors that AlignVLM does not use: the pooling head, the text tower, and buffers that older versions stored.
_SIGLIP_UNUSED = ("vision_model.head.", "vision_model.embeddings.position_ids", "text_model.", "logit_")
_LLAMA_UNUSED = ("model.rotary_emb.",)
# Number of rows of two tied tables that are compared at a time.
_COMPARED_ROWS = 4096
# Tensors of PEFT in a model that was saved before its adapter was merged.
_ADAPTER_TENSOR = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|lora_magnitude_vector|modules_to_save)\b")
_HEAD = "lm_head.weight"
_TIE = 'If the head of the model is its embedding table, add "tie_word_embeddings": true to config.json'
_ROTARY_BUFFER = ".self_attn.rotary_emb.inv_freq"


@dataclasses.dataclass(frozen=True)
class Backbone:
    """An opened folder with a checked config; no weights have been read yet.

    Attributes:
      folder: path of the folder.
      config: config of the model.
      files: tensors of the folder.
      rows: conversion table from tensors to parameters.
      rename: maps the key of a tensor to its key in `rows`.
      unused: prefixes of keys that are ignored.
    """

    folder: Path
    config: VisionConfig | LanguageConfig
    files: TensorFiles
    rows: tuple[Row, ...]
    rename: Callable[[str], str] | None
    unused: tuple[str, ...]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.files.close()

    def match(self, abstract: Params, grow: Collection[str] = ()) -> list[convert.ParameterSource]:
        """Finds the tensors of each parameter of `abstract`; see `convert.match`."""
        try:
            return convert.match(
                self.files,
                self.rows,
                abstract,
                source=self.folder,
                ignore=self.unused,
                rename=self.rename,
                grow=grow,
            )
        except UserError as error:
            if f"{_HEAD} is missing" in str(error):
                raise UserError(f"{error}. {_TIE}") from error
            raise


def open_vision(folder: str | Path) -> Backbone:
    """Opens a SigLIP folder: a complete SigLIP or its vision model alone, in either key layout.

    Raises:
      UserError: if it is not a SigLIP of fixed resolution, or its files are damaged.
    """
    folder = Path(folder)
    config = read_vision_config(folder)
    files = TensorFiles(folder)
    # SiglipModel, and SiglipVisionModel up to transformers 5.0, keep the layers in an inner `vision_model`. A model cut
    # out of a larger one, or saved from a wrapper, has further prefixes.
    prefix = _common_prefix(files, "embeddings.patch_embedding.weight", "vision_model.")
    outer = prefix.removesuffix("vision_model.")

    def rename(key: str) -> str:
        key = key.removeprefix(outer)
        return key if prefix != outer else f"vision_model.{key}"

    return Backbone(folder, config, files, tables.SIGLIP, rename, _SIGLIP_UNUSED)


def open_language(folder: str | Path) -> Backbone:
    """Opens a Llama folder.

    Raises:
      UserError: if it is not a Llama that `models/language.py` supports, or its files are damaged.
    """
    folder = Path(folder)
    config = read_language_config(folder)
    files = TensorFiles(folder)
    _check_complete_weights(files)
    # The decoder's keys begin with `model.`. A decoder cut out of a larger model, saved from a wrapper, or saved
    # without its head has other prefixes (`model.language_model.`, `_orig_mod.model.`, none).
    prefix = _common_prefix(files, "embed_tokens.weight", "model.")
    heads = [key for key in files.shapes if key.endswith(_HEAD)]

    def rename(key: str) -> str:
        if len(heads) == 1 and key == heads[0]:
            return _HEAD
        return f"model.{key.removeprefix(prefix)}" if key.startswith(prefix) else key

    unused = _LLAMA_UNUSED
    if config.tie_word_embeddings:
        _check_tied(files, {rename(key): key for key in files.shapes})
        unused += ("lm_head.",)  # Some files contain the tied table twice.
    unused += tuple(rename(key) for key in files.shapes if key.endswith(_ROTARY_BUFFER))
    return Backbone(folder, config, files, tables.llama(config.tie_word_embeddings), rename, unused)


def _common_prefix(files: TensorFiles, key: str, default: str) -> str:
    """Returns what stands in front of a key that every model of this kind has, or `default` if it is not unique."""
    found = [name.removesuffix(key) for name in files.shapes if name == key or name.endswith(f".{key}")]
    return found[0] if len(found) == 1 else default


def _check_complete_weights(files: TensorFiles) -> None:
    """Checks that the tensors are the model's own weights.

    Raises:
      UserError: if they are quantized, or contain an adapter that has not been merged.
    """
    if problem := describe_quantized_tensors(files.shapes):
        raise UserError(f"{files.folder}: {problem}")
    adapters = [key for key in files.shapes if _ADAPTER_TENSOR.search(key)]
    if adapters:
        raise UserError(
            f"{files.folder}: the weights contain a PEFT adapter that is not merged ({adapters[0]}): call "
            "`model.merge_and_unload()` on the PEFT model, and save what it returns"
        )


def _check_tied(files: TensorFiles, names: Mapping[str, str]) -> None:
    """Checks that a stored LM head equals the embedding table that it is tied to.

    Args:
      files: tensors of the folder.
      names: key of each tensor in the files, by its usual key.

    Raises:
      UserError: if they differ. The config is then wrong; transformers 5 unties the two in this case.
    """
    head, table = names.get(_HEAD), names.get("model.embed_tokens.weight")
    if head is None or table is None or files.shapes[head] != files.shapes[table]:
        return
    # Compare block by block, because comparing complete tables would need memory for a mask of their size.
    rows = range(0, files.shapes[head][0], _COMPARED_ROWS)
    blocks = (slice(start, start + _COMPARED_ROWS) for start in rows)
    if not all(np.array_equal(files.read(head, block), files.read(table, block)) for block in blocks):
        raise UserError(
            f"{files.folder}: config.json has tie_word_embeddings, but {head} differs from {table}: "
            "set tie_word_embeddings to false in it"
        )


@ordinary_modes()
def load_vision_folder(folder: str | Path) -> tuple[VisionConfig, Params]:
    """Reads a SigLIP folder onto the first device, as float32.

    Raises:
      UserError: if the folder, its config or its tensors do not belong to a SigLIP.
    """
    with open_vision(folder) as backbone:
        # Only the shapes matter, so any input of the right shape will do.
        side = backbone.config.image_size
        abstract = _abstract(VisionEncoder(backbone.config), jnp.zeros((1, side, side, 3)))
        return backbone.config, convert.read(backbone.match(abstract), backbone.folder)


@ordinary_modes()
def load_language_folder(folder: str | Path) -> tuple[LanguageConfig, Params]:
    """Reads a Llama folder onto the first device, as float32.

    Raises:
      UserError: if the folder, its config or its tensors do not belong to a Llama.
    """
    with open_language(folder) as backbone:
        ids = jnp.zeros((1, 1), jnp.int32)
        inputs = jnp.zeros((1, 1, backbone.config.hidden_size))
        abstract = _abstract(LanguageModel(backbone.config), inputs, positions=ids, segment_ids=ids)
        return backbone.config, convert.read(backbone.match(abstract), backbone.folder)


def _abstract(module: nn.Module, *inputs: jax.Array, **keywords: jax.Array) -> Params:
    """Returns shapes and dtypes of a module's parameters."""
    return nn.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **keywords)))["params"]


def save_vision_folder(folder: str | Path, config: VisionConfig, params: Params, dtype: str = "bfloat16") -> None:
    """Writes the encoder as a folder for transformers' `SiglipVisionModel.from_pretrained`."""
    _write_folder(folder, siglip_config(config, dtype), params, tables.SIGLIP, dtype)


def save_language_folder(
    folder: str | Path,
    config: LanguageConfig,
    params: Params,
    dtype: str = "bfloat16",
    *,
    special_tokens: Mapping[str, int] | None = None,
) -> None:
    """Writes the decoder as a folder for transformers' `LlamaForCausalLM.from_pretrained`.

    Args:
      folder: output folder; created if it does not exist.
      config: config of the decoder.
      params: parameters of `LanguageModel`.
      dtype: "bfloat16" or "float32".
      special_tokens: token ids to add to `config.json` (`bos_token_id`, ...).
    """
    raw = {**llama_config(config, dtype), **(special_tokens or {})}
    _write_folder(folder, raw, params, tables.llama(config.tie_word_embeddings), dtype)


def _write_folder(folder: str | Path, config: dict, params: Params, rows: Sequence[Row], dtype: str) -> None:
    """Writes `config.json` and the parameters, all of them in one dtype."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    flat = flatten_dict(params, sep="/")
    write_parameters(
        folder,
        rows,
        shapes={path: array.shape for path, array in flat.items()},
        dtypes=dict.fromkeys(flat, DTYPES[dtype]),
        read=lambda path, index: np.asarray(flat[path][index]),
    )
