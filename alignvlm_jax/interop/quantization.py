"""Recognizes quantized weights, which this project does not read, by their config and by the names of their tensors."""

from collections.abc import Iterable, Mapping
from typing import Any

_NAMES = {"bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FBGEMM FP8"}
# Endings of the tensors that each method adds.
_TENSORS = {
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_packed": "compressed-tensors",
    ".scales": "MLX",
}


def describe_quantization(config: Mapping[str, Any]) -> str | None:
    """Returns a problem that names the method if a `config.json` describes quantized weights, or else None."""
    settings = config.get("quantization_config") or config.get("compression_config") or config.get("quantization")
    if not settings:
        return None
    settings = settings if isinstance(settings, Mapping) else {}
    method = settings.get("quant_method")
    if method is None:
        # Older files of bitsandbytes do not name the method, and those of MLX never do.
        is_bitsandbytes = any(str(key).startswith(("load_in_", "bnb_")) for key in settings)
        method = "bitsandbytes" if is_bitsandbytes else "MLX" if "quantization" in config else "an unknown method"
    bits = settings.get("bits") or (4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None)
    return _problem(_NAMES.get(str(method), str(method)) + (f", {bits} bits" if bits else ""))


def describe_quantized_tensors(keys: Iterable[str]) -> str | None:
    """Returns a problem if the names of tensors are those of a method of quantization, or else None."""
    endings = {f".{key.rpartition('.')[2]}" for key in keys} | {".quant_map" for key in keys if ".quant_state." in key}
    method = next((name for ending, name in _TENSORS.items() if ending in endings), None)
    return _problem(method) if method else None


def _problem(method: str) -> str:
    return (
        f"the weights are quantized ({method}), which is not supported: import the original model, with weights in "
        "bfloat16, float16 or float32"
    )
