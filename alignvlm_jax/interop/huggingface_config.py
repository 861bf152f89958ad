"""`config.json` of SigLIP and of Llama: read as, and written from, the configs of `models/`.

What `config.json` leaves out has transformers' default, since transformers leaves out what is its default. All that is
wrong with one is said in one `UserError`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from alignvlm_jax.errors import UserError
from alignvlm_jax.models.language import LanguageConfig, RopeScaling
from alignvlm_jax.models.vision import VisionConfig


def read_vision_config(folder: str | Path, section: str | None = None) -> VisionConfig:
    """The encoder that `config.json`, or a section of it, describes; all that is wrong with it in one error."""
    raw = _RawConfig(Path(folder))
    if section is not None:
        raw.fields = raw.get(section, {})
    kinds = [raw.get("model_type", None)]
    if isinstance(raw.fields.get("vision_config"), dict):
        raw.fields = raw.fields["vision_config"]
        kinds.append(raw.get("model_type", "siglip_vision_model"))
    if {"siglip2", "siglip2_vision_model"} & set(kinds) or "num_patches" in raw.fields:
        raise UserError(
            f"{raw.path}: this is a NaFlex SigLIP 2, which takes images of any shape; AlignVLM cuts square tiles and "
            'needs one of fixed resolution (of model_type "siglip", such as siglip2-so400m-patch14-384)'
        )
    others = [kind for kind in kinds if kind not in ("siglip", "siglip_vision_model")]
    if others:
        raise UserError(f"{raw.path}: model_type is {others[0]!r}, not that of a SigLIP vision model")
    raw.must_be("hidden_act", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    raw.must_be("num_channels", 3, 3)
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
        raw.problems.append(f"patch_size {config.patch_size} is more than image_size {config.image_size}")
    if config.hidden_size % config.num_heads:
        raw.problems.append(f"{config.num_heads} heads do not divide hidden_size {config.hidden_size}")
    raw.finish()
    return config


def read_language_config(folder: str | Path, section: str | None = None) -> LanguageConfig:
    """The decoder that `config.json`, or a section of it, describes; all that is wrong with it in one error."""
    raw = _RawConfig(Path(folder))
    if section is not None:
        raw.fields = raw.get(section, {})
    kind = raw.get("model_type", None)
    if kind != "llama":
        raise UserError(f"{raw.path}: model_type is {kind!r}, expected 'llama'")
    raw.must_be("hidden_act", "silu", "silu")
    raw.must_be("attention_bias", False, False)
    raw.must_be("mlp_bias", False, False)
    hidden_size, num_heads = raw.count("hidden_size", 4096), raw.count("num_attention_heads", 32)
    theta, scaling = _read_rope(raw)
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
        raw.problems.append(f"{num_heads} heads do not divide hidden_size {hidden_size}, and no head_dim is given")
    elif config.head_width % 2:
        raw.problems.append(f"head_dim is {config.head_width}, which does not fall into rotary pairs")
    if num_heads % config.num_kv_heads:
        raw.problems.append(f"num_key_value_heads {config.num_kv_heads} does not divide {num_heads} heads")
    raw.finish()
    return config


def _read_rope(raw: "_RawConfig") -> tuple[float, RopeScaling | None]:
    """The rotary base and scaling: two top-level keys, which transformers 5 moved into `rope_parameters`."""
    rope = raw.get("rope_scaling", None) or raw.get("rope_parameters", None) or {}
    if not isinstance(rope, dict):
        raw.problems.append(f"the rotary settings are {rope!r}, not a table of names and values")
        rope = {}
    settings = raw.nested({"rope_theta": raw.get("rope_theta", 10000.0), **rope})
    theta = settings.number("rope_theta", 10000.0)
    settings.must_be("partial_rotary_factor", 1.0, 1.0)
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
    """The fields of a `config.json`, and what is wrong with them. A field that is null counts as left out."""

    def __init__(self, folder: Path):
        self.path = folder / "config.json"
        self.problems: list[str] = []
        try:
            self.fields = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{folder} is not a Hugging Face folder: it has no config.json") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} is not JSON: {error}") from error
        if not isinstance(self.fields, dict):
            raise UserError(f"{self.path} is not a config: it must be a table of names and values")
        if self.fields.get("quantization_config"):
            self.problems.append("the weights are quantized; import the folder they were made from")

    def nested(self, fields: dict[str, Any]) -> "_RawConfig":
        """Other fields of the same file."""
        nested = object.__new__(_RawConfig)
        nested.path, nested.problems, nested.fields = self.path, self.problems, fields
        return nested

    def get(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        return default if value is None else value

    def number(self, name: str, default: float | None) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            self.problems.append(f"{name} is {value!r}, expected a number above 0")
            return 1.0
        return float(value)

    def count(self, name: str, default: int | None) -> int:
        """A whole number above 0; `default` may be 0 for "not given"."""
        value = self.get(name, default)
        if value == default and value is not None:
            return value
        if type(value) is not int or value < 1:
            self.problems.append(f"{name} is {value!r}, expected a whole number above 0")
            return 1
        return value

    def side(self, name: str, default: int) -> int:
        """The side of a square: one number, or the same one twice."""
        value = self.get(name, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            self.fields = {**self.fields, name: value[0]}
        elif isinstance(value, list):
            self.problems.append(f"{name} is {value}, expected a square")
            return default
        return self.count(name, default)

    def must_be(self, name: str, expected: Any, default: Any) -> None:
        value = self.get(name, default)
        if value != expected:
            self.problems.append(f"{name} is {value!r}, only {expected!r} is supported")

    def finish(self) -> None:
        """Raises what was found, if anything."""
        if self.problems:
            raise UserError(f"{self.path}: " + "; ".join(self.problems))


def siglip_config(config: VisionConfig, dtype: str) -> dict[str, Any]:
    """The encoder's `config.json`: a `SiglipVisionConfig`."""
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
    """The decoder's `config.json`: a `LlamaConfig`."""
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
