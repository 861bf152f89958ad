"""Rows of the conversion tables between our parameters and PyTorch's tensors.

A `Row` pairs the path of a parameter in our tree with the key of a tensor in PyTorch's state dict, and says how the
axes differ. Tables are sequences of rows: each connector has its own (`models/connectors/`), and `interop/tables.py`
holds those of the backbones and of the whole model. `interop/convert.py` reads by them, `interop/tensor_writer.py`
writes by them.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """Conversion between a tensor and a parameter, in both directions. Both return views where numpy can.

    Attributes:
      to_jax: returns the parameter for a tensor.
      to_torch: returns the tensor for a parameter.
      torch_shape: returns the tensor's shape for a parameter's shape.
    """

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]
    torch_shape: Callable[[Shape], Shape]


def _conv(torch_shape: Callable[[Shape], Shape]) -> Transform:
    """Returns the transform of a convolution whose stride equals its kernel.

    torch.nn.Conv2d holds [out, channel, row, column]. Our kernel multiplies flattened windows, in the order (row,
    column, channel).
    """

    def to_torch(kernel: np.ndarray) -> np.ndarray:
        out, channels, height, width = torch_shape(kernel.shape)
        return kernel.reshape(height, width, channels, out).transpose(3, 2, 0, 1)

    def to_jax(tensor: np.ndarray) -> np.ndarray:
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])

    return Transform(to_jax, to_torch, torch_shape)


def _patch_shape(shape: Shape) -> Shape:
    side = math.isqrt(shape[0] // 3)
    return shape[1], 3, side, side


def _window_shape(shape: Shape) -> Shape:
    width = shape[1]
    return width, width, 1, shape[0] // width


SAME = Transform(lambda tensor: tensor, lambda array: array, lambda shape: shape)
# torch.nn.Linear holds [out, in]; our Dense holds [in, out].
TRANSPOSED = Transform(lambda tensor: tensor.T, lambda array: array.T, lambda shape: shape[::-1])
# Square patches of RGB.
CONV = _conv(_patch_shape)
# Windows of one row, with as many channels out as in.
WINDOW_CONV = _conv(_window_shape)
# A depthwise torch.nn.Conv2d holds [channel, 1, row, column]; ours is [row, column, channel].
DEPTHWISE = Transform(
    lambda tensor: tensor[:, 0].transpose(1, 2, 0),
    lambda array: array.transpose(2, 0, 1)[:, None],
    lambda shape: (shape[2], 1, *shape[:2]),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter and its tensor.

    Attributes:
      path: path of the parameter, such as "layers/attention/query/kernel".
      key: key of the tensor. `{layer}` stands for the number of a layer, whose tensors are stacked on a leading axis of
        the parameter, because layers run under `nn.scan`.
      transform: conversion between the two.
    """

    path: str
    key: str
    transform: Transform = SAME


def linear_rows(path: str, key: str, *, bias: bool) -> list[Row]:
    """Returns the rows of a torch.nn.Linear, which is our `Dense`."""
    rows = [Row(f"{path}/kernel", f"{key}.weight", TRANSPOSED)]
    return rows + [Row(f"{path}/bias", f"{key}.bias")] if bias else rows


def layer_norm_rows(path: str, key: str) -> list[Row]:
    """Returns the rows of a torch.nn.LayerNorm."""
    return [Row(f"{path}/scale", f"{key}.weight"), Row(f"{path}/bias", f"{key}.bias")]
