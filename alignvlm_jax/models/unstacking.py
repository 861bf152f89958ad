"""Decoder weights with one tree per layer, for decoding on a CPU.

Training stacks the weights of all layers, so that one scan runs them: [layers, i, o]. On a CPU, XLA copies the slice of
a layer before it multiplies with it. A decoding step uses every weight once, so these copies would take as long as its
products. `unstack_layers` avoids them:

    stacked:   {"mlp": {"up": {"kernel": [30, 576, 1536]}, ...}, ...}
    unstacked: ({"mlp": {"up": {"kernel": [576, 1536]}, ...}, ...}, ...)    30 trees

Prefill multiplies each weight with all positions of a prompt, so there a copy hardly counts. It keeps the scan, which
compiles faster. TPUs and GPUs read a slice of stacked weights where it is, and always keep the scan.
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np


def unstack_layers(variables: dict[str, Any]) -> tuple[Any, ...] | None:
    """Returns the weights of each decoder layer as views of the stacked weights, or None if they are not on one CPU.

    The views share the memory of the stacked weights, so neither may be donated.

    Args:
      variables: variables of `AlignVLM`.
    """
    leaves, structure = jax.tree.flatten(nn.unbox(variables["params"]["language"]["layers"]))
    if not all(_is_on_one_cpu(leaf) for leaf in leaves):
        return None
    # A view in numpy, which JAX takes without a copy if it is aligned. A slice in JAX would be a copy.
    arrays = [np.asarray(leaf) for leaf in leaves]
    (device,) = leaves[0].devices()
    return tuple(
        structure.unflatten([jax.device_put(array[layer], device, may_alias=True) for array in arrays])
        for layer in range(len(arrays[0]))
    )


def with_layers(variables: dict[str, Any], layers: tuple[Any, ...]) -> dict[str, Any]:
    """Returns the variables of `AlignVLM` with the weights from `unstack_layers` in place of the stacked ones."""
    params = variables["params"]
    return {**variables, "params": {**params, "language": {**params["language"], "layers": layers}}}


def is_unstacked(layers: Any) -> bool:
    """Returns whether the weights of the decoder's layers are from `unstack_layers`."""
    return isinstance(layers, tuple)


def _is_on_one_cpu(leaf: Any) -> bool:
    # The set belongs to the sharding, so it must not be changed.
    return isinstance(leaf, jax.Array) and [device.platform for device in leaf.devices()] == ["cpu"]
