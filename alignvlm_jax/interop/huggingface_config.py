"""Converts between `config.json` of SigLIP and Llama and the configs of `models/`.

transformers does not write values that equal its defaults, so a missing key has transformers' default. All problems of
a file are reported in one `UserError`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_jax.downloads.stubs import describe_stub
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop.quantization import describe_quantization
from alignvlm_jax.models.language import LanguageConfig, RopeScaling
from alignvlm_jax.models.vision import VisionConfig


def read_vision_config(folder: str | Path, section: str | None = None) -> VisionConfig:
    """Reads the config of a vision encoder from `config.json`.

    Args:
      folder: folder of the file.
      section: key of the section with the encoder's config; None uses the whole file.

    Raises:
      UserError: if the file does not describe a supported encoder; lists all problems.
    """
    raw = _RawConfig(Path(folder))
    if section is not None:
        raw.fields = raw.get(section, {})
    kinds = [raw.get("model_type", None)]
    # A complete SigLIP has the vision model's config in a section.
    if isinstance(raw.fields.get("vision_config"), dict):
        raw.fields = raw.fields["vision_config"]
        kinds.append(raw.get("model_type", "siglip_vision_model"))
    if {"siglip2", "siglip2_vision_model"} & set(kinds) or "num_patches" in raw.fields:
        raise UserError(
            f"{raw.path}: this is a NaFlex SigLIP 2, which accepts images of any shape; AlignVLM cuts square tiles and "
            'needs an encoder of fixed resolution (model_type "siglip", such as siglip2-so400m-patch14-384)'
        )
    # Refuse other models, and settings that `VisionEncoder` does not implement.
    others = [kind for kind in kinds if kind not in ("siglip", "siglip_vision_model")]
    if others:
        raise UserError(f"{raw.path}: model_type is {others[0]!r}, expected 'siglip' or 'siglip_vision_model'")
    raw.must_be("hidden_act", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    raw.must_be("num_channels", 3, 3)
    # Same defaults as transformers' SiglipVisionConfig.
    config = VisionConfig(
        image_size=raw.side("image_size", 224),
        patch_size=raw.side("patch_size", 16),
        hidden_size=raw.count("hidden_size", 768),
        intermediate_size=raw.count("intermediate_size", 3072),
        num_layers=raw.count("num_hidden_layers", 12),
        num_heads=raw.count("num_attention_heads", 12),
        layer_norm_eps=raw.number("layer_norm_eps", 1e-6),
    )
    if config.patch_size > config.image_size:
        raw.problems.append(f"patch_size {config.patch_size} is larger than image_size {config.image_size}")
    if config.hidden_size % config.num_heads:
        raw.problems.append(f"hidden_size {config.hidden_size} is not divisible by {config.num_heads} heads")
    raw.finish()
    return config


def read_language_config(folder: str | Path, section: str | None = None) -> LanguageConfig:
    """Reads the config of a language model from `config.json`.

    Args:
      folder: folder of the file.
      section: key of the section with the language model's config; None uses the whole file.

    Raises:
      UserError: if the file does not describe a supported language model; lists all problems.
    """
    raw = _RawConfig(Path(folder))
    if section is not None:
        raw.fields = raw.get(section, {})
    kind = raw.get("model_type", None)
    if kind != "llama":
        raise UserError(f"{raw.path}: model_type is {kind!r}, expected 'llama'")
    # Refuse settings that `LanguageModel` does not implement.
    raw.must_be("hidden_act", "silu", "silu")
    raw.must_be("attention_bias", False, False)
    raw.must_be("mlp_bias", False, False)
    hidden_size, num_heads = raw.count("hidden_size", 4096), raw.count("num_attention_heads", 32)
    theta, scaling = _read_rope(raw)
    # Same defaults as transformers' LlamaConfig.
    config = LanguageConfig(
        vocab_size=raw.count("vocab_size", 32000),
        hidden_size=hidden_size,
        intermediate_size=raw.count("intermediate_size", 11008),
        num_layers=raw.count("num_hidden_layers", 32),
        num_heads=num_heads,
        num_kv_heads=raw.count("num_key_value_heads", num_heads),
        head_dim=raw.count("head_dim", 0) or None,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=raw.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_position_embeddings=raw.count("max_position_embeddings", 2048),
    )
    if config.head_dim is None and hidden_size % num_heads:
        raw.problems.append(f"hidden_size {hidden_size} is not divisible by {num_heads} heads, and head_dim is missing")
    elif config.head_width % 2:
        raw.problems.append(f"head_dim is {config.head_width}; rotary embeddings need an even number")
    if num_heads % config.num_kv_heads:
        raw.problems.append(f"{num_heads} heads are not divisible by num_key_value_heads {config.num_kv_heads}")
    raw.finish()
    return config


def _read_rope(raw: "_RawConfig") -> tuple[float, RopeScaling | None]:
    """Returns the rotary base and scaling.

    They are the top-level keys `rope_theta` and `rope_scaling`, or in transformers 5 the section `rope_parameters`.
    """
    rope = raw.get("rope_scaling", None) or raw.get("rope_parameters", None) or {}
    if not isinstance(rope, dict):
        raw.problems.append(f"the rotary settings are {rope!r}, expected a JSON object")
        rope = {}
    settings = raw.nested({"rope_theta": raw.get("rope_theta", 10000.0), **rope})
    theta = settings.number("rope_theta", 10000.0)
    settings.must_be("partial_rotary_factor", 1.0, 1.0)
    # The first files of Llama 3.1 spell `rope_type` as `type`.
    kind = settings.get("rope_type", None) or settings.get("type", "default")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raw.problems.append(f"rope type {kind!r} is not supported, only 'default' and 'llama3'")
        return theta, None
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    missing = [name for name in names if settings.get(name, None) is None]
    if missing:
        raw.problems.append(f"rope type 'llama3' needs {', '.join(missing)}")
        return theta, None
    return theta, RopeScaling(
        factor=settings.number("factor", None),
        low_freq_factor=settings.number("low_freq_factor", None),
        high_freq_factor=settings.number("high_freq_factor", None),
        original_max_position_embeddings=settings.count("original_max_position_embeddings", None),
    )


class _RawConfig:
    """Reads the fields of a `config.json` and collects their problems. A field that is null counts as missing."""

    def __init__(self, folder: Path):
        self.path = folder / "config.json"
        self.problems: list[str] = []
        try:
            self.fields = json.loads(self.path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise UserError(
                f"{self.path} {reason}"
                if (reason := describe_stub(self.path))
                else f"{folder} is not a Hugging Face folder: it has no config.json"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} {describe_stub(self.path) or f'is not JSON: {error}'}") from error
        if not isinstance(self.fields, dict):
            raise UserError(f"{self.path} is not a config: expected a JSON object")
        if quantized := describe_quantization(self.fields):
            self.problems.append(quantized)

    def nested(self, fields: dict[str, Any]) -> "_RawConfig":
        """Returns a reader of other fields of the same file; it shares the list of problems."""
        # Bypass __init__, which would read the file again.
        nested = object.__new__(_RawConfig)
        nested.path, nested.problems, nested.fields = self.path, self.problems, fields
        return nested

    def get(self, name: str, default: Any) -> Any:
        """Returns a field, or `default` if it is missing or null."""
        value = self.fields.get(name)
        return default if value is None else value

    def number(self, name: str, default: float | None) -> float:
        """Returns a positive number. Anything else is added to the problems, and 1 is returned to continue."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            self.problems.append(f"{name} is {value!r}, expected a positive number")
            return 1.0
        return _without_rounding(float(value))

    def count(self, name: str, default: int | None) -> int:
        """Returns a positive integer. Anything else is a problem, except a `default` of 0, which means "not given"."""
        value = self.get(name, default)
        if value == default and value is not None:
            return value
        if type(value) is not int or value < 1:
            self.problems.append(f"{name} is {value!r}, expected a positive integer")
            return 1
        return value

    def side(self, name: str, default: int) -> int:
        """Returns the side of a square, given as one number or as two equal ones."""
        value = self.get(name, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            self.fields = {**self.fields, name: value[0]}
        elif isinstance(value, list):
            self.problems.append(f"{name} is {value}, expected a square")
            return default
        return self.count(name, default)

    def must_be(self, name: str, expected: Any, default: Any) -> None:
        """Adds a problem if a field does not have the only value that the models support."""
        value = self.get(name, default)
        if value != expected:
            self.problems.append(f"{name} is {value!r}, only {expected!r} is supported")

    def finish(self) -> None:
        """Raises a `UserError` with all problems, if there are any."""
        if self.problems:
            raise UserError(f"{self.path}: " + "; ".join(self.problems))


def _without_rounding(number: float) -> float:
    """Returns the number that was written as float32: 1e-05 for 9.999999747378752e-06."""
    single = np.float32(number)
    return float(str(single)) if single == number else number


def siglip_config(config: VisionConfig, dtype: str) -> dict[str, Any]:
    """Returns the `config.json` of an encoder (a `SiglipVisionConfig`)."""
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": config.hidden_size,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": config.layer_norm_eps,
        "attention_dropout": 0.0,
        "vision_use_head": False,
        "dtype": dtype,
    }


def llama_config(config: LanguageConfig, dtype: str) -> dict[str, Any]:
    """Returns the `config.json` of a decoder (a `LlamaConfig`)."""
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": dtype,
    }
