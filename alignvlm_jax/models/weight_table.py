"""Rows of the tables that convert between the parameters of this package and PyTorch's tensors.

A `Row` pairs the path of a parameter with the key of a tensor in PyTorch's state dict, and holds the transform between
their axes. A table is a sequence of rows. Each connector has its own (`models/connectors/`); `interop/tables.py` holds
those of the backbones and of the complete model. `interop/convert.py` reads weights with these tables, and
`interop/tensor_writer.py` writes weights with them.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """Conversion between a tensor and a parameter. Both directions return views where NumPy can.

    Attributes:
      to_jax: converts a tensor to the parameter.
      to_torch: converts a parameter to the tensor.
      torch_shape: converts the shape of a parameter to the shape of the tensor.
    """

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]
    torch_shape: Callable[[Shape], Shape]


def _conv(torch_shape: Callable[[Shape], Shape]) -> Transform:
    """Returns the transform of a convolution whose stride equals its kernel.

    The weight of torch.nn.Conv2d is [out, channel, row, column]. Here, such a convolution is a matrix product with
    flattened windows, so the kernel is [row * column * channel, out].
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
# The weight of torch.nn.Linear is [out, in]; the kernel of `Dense` is [in, out].
TRANSPOSED = Transform(lambda tensor: tensor.T, lambda array: array.T, lambda shape: shape[::-1])
# Convolution of square RGB patches.
CONV = _conv(_patch_shape)
# Convolution of windows within a row, with the same number of input and output channels.
WINDOW_CONV = _conv(_window_shape)
# The weight of a depthwise torch.nn.Conv2d is [channel, 1, row, column]; the kernel is [row, column, channel].
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
      key: key of the tensor. `{layer}` stands for the number of a layer: the tensors of all layers are stacked along
        the first axis of the parameter, because layers run under `nn.scan`.
      transform: conversion between the two.
    """

    path: str
    key: str
    transform: Transform = SAME


def linear_rows(path: str, key: str, *, bias: bool) -> list[Row]:
    """Returns the rows that convert between a torch.nn.Linear and a `Dense`."""
    rows = [Row(f"{path}/kernel", f"{key}.weight", TRANSPOSED)]
    return rows + [Row(f"{path}/bias", f"{key}.bias")] if bias else rows


def layer_norm_rows(path: str, key: str) -> list[Row]:
    """Returns the rows that convert between a torch.nn.LayerNorm and a `LayerNorm`."""
    return [Row(f"{path}/scale", f"{key}.weight"), Row(f"{path}/bias", f"{key}.bias")]
