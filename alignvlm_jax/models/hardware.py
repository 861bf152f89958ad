"""Resolves "auto" in a config to the dtype and the attention kernel that suit the device.

    device                          dtype      attention
    TPU                             bfloat16   splash
    GPU, Ampere or newer            bfloat16   flash
    older GPU, CPU                  float32    xla

Weights, their gradients, the optimizer, softmax and norm statistics, and the loss with all its sums stay float32.
"""

import dataclasses
from typing import TypeVar

import jax

from alignvlm_jax.ops.attention import default_kernel

AUTO = "auto"
DTYPES = (AUTO, "float32", "bfloat16")

Config = TypeVar("Config")
"""A dataclass with the fields `dtype` and `attention`: `VisionConfig` or `LanguageConfig`."""


def resolve(config: Config, device: jax.Device | None = None) -> Config:
    """Returns the config without "auto", for a device; None means the first device of this machine."""
    if AUTO not in (config.dtype, config.attention):
        return config
    device = device or jax.devices()[0]
    kernel = default_kernel(device)
    dtype = "float32" if kernel == "xla" else "bfloat16"
    return dataclasses.replace(
        config,
        dtype=dtype if config.dtype == AUTO else config.dtype,
        attention=kernel if config.attention == AUTO else config.attention,
    )
