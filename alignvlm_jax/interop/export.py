"""Exports a checkpoint as a folder for PyTorch.

    export_alignvlm("runs/demo/checkpoint", "alignvlm-nano")       # the complete model, with its own code
    export_language("runs/demo/checkpoint", "llama-nano")          # the decoder, a plain Llama
    export_vision("runs/demo/checkpoint", "siglip-nano")           # the encoder, a plain SigLIP

`AutoModelForImageTextToText`, `AutoProcessor` and `pipeline` of transformers 5 load the folder of the complete model:

    config.json                    configs of the three parts, and the classes in the code files (`auto_map`)
    model.safetensors              weights (above 5 GB: shards and an index)
    *_alignvlm.py                  the model and its processor in PyTorch
    processor_config.json          settings for cutting pages into tiles
    tokenizer.json, tokenizer_config.json, chat_template.jinja
    generation_config.json         ids of the tokens that begin, end and pad a text
    alignvlm_training.json         config, progress and history of the checkpoint, for importing it again
    README.md                      the model card

Weights are read from the checkpoint one layer at a time and written one file at a time, on the host. This needs neither
torch nor an accelerator, and the peak memory is the size of one file (5 GB) plus one matrix.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from alignvlm_jax.checkpoints.new_folder import new_folder
from alignvlm_jax.checkpoints.weights import ParameterReader, read_page_scale
from alignvlm_jax.config.serialization import config_to_dict
from alignvlm_jax.data.chat import CONFIG_FILE as TOKENIZER_CONFIG_FILE
from alignvlm_jax.data.chat import ChatTokenizer, special_names
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import tables
from alignvlm_jax.interop.huggingface_config import llama_config, siglip_config
from alignvlm_jax.interop.model_card import model_card
from alignvlm_jax.interop.pytorch import REMOTE_CODE_FILES, remote_code
from alignvlm_jax.interop.tensor_writer import DTYPES, MAX_SHARD_BYTES, write_parameters
from alignvlm_jax.interop.tokenizer import export_tokenizer
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import AlignVLMConfig, parameter_shapes, stored_dtypes, token_grid, tokens_per_tile
from alignvlm_jax.models.connectors import connector_spec
from alignvlm_jax.models.weight_table import Row

TRAINING_FILE = "alignvlm_training.json"
PROCESSOR_FILE = "processor_config.json"


@ordinary_modes()
def export_alignvlm(
    checkpoint: str | Path, out: str | Path, *, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes the complete model.

    Args:
      checkpoint: a workdir (its latest step is used), or one of its step folders.
      out: output folder; it must be empty or not exist yet.
      dtype: "float32", "bfloat16" or "float16"; None keeps the dtype of every weight.
      max_shard_bytes: maximum size of a file of weights; larger models are split.

    Raises:
      UserError: if there is no complete and undamaged checkpoint, or `out` is not empty or cannot be written.
    """
    source = _Source(checkpoint, dtype)
    with new_folder(out) as folder:
        # Weights and tokenizer, the code that runs them, and the configs that transformers reads.
        source.write_weights(folder, tables.alignvlm(source.model), "", max_shard_bytes)
        export_tokenizer(source.reader.tokenizer_folder, folder)
        for name in REMOTE_CODE_FILES:
            (folder / name).write_text(remote_code(name), encoding="utf-8")
        _write_json(folder / PROCESSOR_FILE, processor_config(source.model, source.tiling, source.image_token))
        _write_json(folder / "generation_config.json", source.special_ids)
        _write_json(folder / TRAINING_FILE, source.training_json())
        (folder / "README.md").write_text(model_card(source.reader, dtype=source.dtype), encoding="utf-8")
        _write_json(folder / "config.json", source.config_json())  # last, because it makes the folder a model


@ordinary_modes()
def export_language(
    checkpoint: str | Path, out: str | Path, *, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes the decoder alone, for `LlamaForCausalLM`; see `export_alignvlm` for arguments and errors."""
    source = _Source(checkpoint, dtype)
    language = source.model.language
    with new_folder(out) as folder:
        rows = tables.llama(language.tie_word_embeddings)
        source.write_weights(folder, rows, "language/", max_shard_bytes)
        export_tokenizer(source.reader.tokenizer_folder, folder, language_only=True)
        _write_json(folder / "generation_config.json", source.special_ids)
        (folder / "README.md").write_text(model_card(source.reader, dtype=source.dtype, part="language"), "utf-8")
        _write_json(folder / "config.json", {**llama_config(language, source.dtype), **source.special_ids})


@ordinary_modes()
def export_vision(
    checkpoint: str | Path, out: str | Path, *, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes the encoder alone, for `SiglipVisionModel`; see `export_alignvlm` for arguments and errors."""
    source = _Source(checkpoint, dtype)
    vision = source.model.vision
    with new_folder(out) as folder:
        source.write_weights(folder, tables.SIGLIP, "vision/", max_shard_bytes)
        _write_json(folder / "preprocessor_config.json", _siglip_preprocessor(vision.image_size))
        (folder / "README.md").write_text(model_card(source.reader, dtype=source.dtype, part="vision"), "utf-8")
        _write_json(folder / "config.json", siglip_config(vision, source.dtype))


def alignvlm_config(
    config: AlignVLMConfig, *, dtype: str, image_token_id: int, special_ids: dict[str, Any]
) -> dict[str, Any]:
    """Returns the `config.json` of the complete model."""
    connector = connector_spec(config.connector).name
    return {
        "architectures": ["AlignVLMForConditionalGeneration"],
        "model_type": "alignvlm",
        "auto_map": {
            "AutoConfig": "configuration_alignvlm.AlignVLMConfig",
            "AutoModel": "modeling_alignvlm.AlignVLMModel",
            "AutoModelForImageTextToText": "modeling_alignvlm.AlignVLMForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_alignvlm.AlignVLMForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_alignvlm.AlignVLMForConditionalGeneration",
            "AutoProcessor": "processing_alignvlm.AlignVLMProcessor",
            "AutoImageProcessor": "image_processing_alignvlm.AlignVLMImageProcessor",
        },
        "vision_config": _without_class(siglip_config(config.vision, dtype)),
        "text_config": _without_class({**llama_config(config.language, dtype), **special_ids}),
        "connector_config": {"name": connector, **dataclasses.asdict(config.connector)},
        "newline": config.newline,
        "image_token_id": image_token_id,
        "tie_word_embeddings": config.language.tie_word_embeddings,
        "dtype": dtype,
        **special_ids,
    }


def processor_config(config: AlignVLMConfig, tiling: TilingConfig, image_token: str) -> dict[str, Any]:
    """Returns `processor_config.json`: settings for cutting pages into tiles, and for the placeholders of a tile."""
    return {
        "processor_class": "AlignVLMProcessor",
        "auto_map": {"AutoProcessor": "processing_alignvlm.AlignVLMProcessor"},
        "tokens_per_tile": tokens_per_tile(config),
        "image_token": image_token,
        "image_processor": {
            "image_processor_type": "AlignVLMImageProcessor",
            "auto_map": {"AutoImageProcessor": "image_processing_alignvlm.AlignVLMImageProcessor"},
            **dataclasses.asdict(tiling),
            "token_grid": list(token_grid(config)),
        },
    }


class _Source:
    """A checkpoint to be exported.

    Attributes:
      reader: reader of its weights.
      model: config of the model.
      tiling: settings for cutting pages into tiles.
      dtype: dtype in the exported config. The weights also have this dtype, unless they keep the dtypes
        of the checkpoint.
      image_token: placeholder of an image in the text.
      image_id: its id.
      special_ids: ids of the tokens that begin, end and pad a text.
    """

    def __init__(self, checkpoint: str | Path, dtype: str | None):
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        self.reader = ParameterReader(checkpoint)
        self.model = self.reader.config.model
        self.tiling = self.reader.config.data.tiling
        self._checkpoint, self._dtype = checkpoint, dtype
        self._check_shapes(checkpoint)
        # config.json states a single dtype; the embedding table's stands for all weights.
        self.dtype = dtype or self.reader.dtypes["language/embedding"].name
        chat = ChatTokenizer.from_folder(self.reader.tokenizer_folder)
        names = special_names(json.loads((self.reader.tokenizer_folder / TOKENIZER_CONFIG_FILE).read_text("utf-8")))
        self.image_token, self.image_id = names["image_token"], chat.image_id
        self.special_ids = {
            "bos_token_id": chat.token_to_id(names["bos_token"]) if "bos_token" in names else None,
            "eos_token_id": list(chat.end_ids),
            "pad_token_id": chat.pad_id,
        }

    def write_weights(self, folder: Path, rows: Sequence[Row], prefix: str, max_shard_bytes: int) -> None:
        """Writes the tensors of `rows`, whose paths are relative to `prefix` in the checkpoint."""
        reader = self.reader
        dtypes = reader.dtypes
        # A few parameters of connectors keep their own dtype; `stored_dtypes` knows which.
        if self._dtype:
            stored = stored_dtypes(unflatten_dict(dtypes, sep="/"), self._dtype)
            dtypes = {path: jnp.dtype(dtype) for path, dtype in flatten_dict(stored, sep="/").items()}
        write_parameters(
            folder,
            [dataclasses.replace(row, path=prefix + row.path) for row in rows],
            shapes=reader.shapes,
            dtypes=dtypes,
            read=reader.read,
            max_shard_bytes=max_shard_bytes,
            title=f"writing {self.dtype}",
        )

    def config_json(self) -> dict[str, Any]:
        """Returns the content of `config.json`."""
        return alignvlm_config(self.model, dtype=self.dtype, image_token_id=self.image_id, special_ids=self.special_ids)

    def training_json(self) -> dict[str, Any]:
        """Returns the content of `alignvlm_training.json`."""
        return {
            "config": config_to_dict(self.reader.config),
            "meta": self.reader.meta,
            "history": self.reader.history,
            "page_scale": read_page_scale(self._checkpoint),
        }

    def _check_shapes(self, checkpoint: str | Path) -> None:
        """Checks that the weights have the shapes given by the config of the checkpoint.

        Raises:
          UserError: if they differ; lists all problems.
        """
        shapes = flatten_dict(nn.unbox(parameter_shapes(self.model)))
        expected = {"/".join(path): leaf.shape for path, leaf in shapes.items()}
        actual = self.reader.shapes
        problems = [f"{path} is missing" for path in expected if path not in actual]
        problems += [f"{path} is not part of this model" for path in actual if path not in expected]
        problems += [
            f"{path} has shape {list(actual[path])}, the config says {list(shape)}"
            for path, shape in expected.items()
            if actual.get(path, shape) != shape
        ]
        if problems:
            raise UserError(f"{checkpoint}: the weights do not fit its config: " + "; ".join(problems))


def _without_class(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of a part without its class, as in the config of the complete model."""
    return {key: value for key, value in config.items() if key != "architectures"}


def _siglip_preprocessor(side: int) -> dict[str, Any]:
    """Returns `preprocessor_config.json` of the encoder alone."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,  # Bicubic, as for our tiles.
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
