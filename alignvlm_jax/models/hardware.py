"""Resolves "auto" in a config to the dtype and the attention kernel that suit the device.

    device                               dtype      attention
    TPU                                  bfloat16   splash
    GPU, Hopper, with tokamax            bfloat16   tokamax
    GPU, Ampere or newer                 bfloat16   flash, or xla if JAX no longer has that kernel
    older GPU                            float32    xla
    CPU                                  float32    cpu

Weights, their gradients, the optimizer, softmax and norm statistics, and the loss with all its sums stay float32.
(On request, devices exchange gradients in bfloat16: `MeshConfig.gradient_dtype`.)
"""

import dataclasses
from typing import TypeVar

import jax

from alignvlm_jax.ops.attention import default_kernel, has_bfloat16

AUTO = "auto"
MAX_UNROLLED_LAYERS = 8
DTYPES = (AUTO, "float32", "bfloat16")

Config = TypeVar("Config")
"""A dataclass with the fields `dtype` and `attention`: `VisionConfig` or `LanguageConfig`."""


def resolve(config: Config, device: jax.Device | None = None) -> Config:
    """Returns the config without "auto", for a device; None means the first device of this machine."""
    if AUTO not in (config.dtype, config.attention):
        return config
    device = device or jax.devices()[0]
    return dataclasses.replace(
        config,
        dtype=("bfloat16" if has_bfloat16(device) else "float32") if config.dtype == AUTO else config.dtype,
        attention=default_kernel(device) if config.attention == AUTO else config.attention,
    )


def unrolls_layers(config: Config) -> bool:
    """Returns whether the layers of a resolved config are compiled one by one instead of as a loop.

    On a CPU, a loop copies what a layer keeps for the backward pass to an array of all layers, and back. Unrolled
    layers do not, but take longer to compile, so deep models keep the loop. So do models with rematerialization:
    without a loop, the compiler would recognize the recomputed values as equal to the first ones and keep those.
    """
    return config.attention == "cpu" and config.remat == "none" and config.num_layers <= MAX_UNROLLED_LAYERS
