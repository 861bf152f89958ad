"""Decoder weights with one tree per layer, for decoding on a CPU.

Training stacks the weights of all layers, so that one scan runs them: [layers, i, o]. On a CPU, XLA copies the slice of
a layer before it multiplies with it. In a decoding step, which uses every weight once, these copies take as long as the
products. `unstack_layers` avoids them:

    before: layers = {"mlp": {"up": {"kernel": [30, 576, 1536]}, ...}, ...}
    after:  layers = ({"mlp": {"up": {"kernel": [576, 1536]}, ...}, ...}, ...)    30 trees

TPUs and GPUs read a slice of stacked weights where it is, so there the scan remains, which compiles faster.
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np


def unstack_layers(variables: dict[str, Any]) -> dict[str, Any]:
    """Returns the variables of `AlignVLM` with one tree of decoder weights per layer.

    The new arrays are views of the same memory. Do not donate either.

    Args:
      variables: variables whose arrays are all on one device. They are returned as they are if it is not a CPU, or if
        they are unstacked already.
    """
    params = variables["params"]
    stacked = nn.unbox(params["language"]["layers"])
    leaves, structure = jax.tree.flatten(stacked)
    if isinstance(stacked, tuple) or not all(_is_on_one_cpu(leaf) for leaf in leaves):
        return variables
    # A view in numpy, which JAX takes without a copy if it is aligned. A slice in JAX would be a copy.
    arrays = [np.asarray(leaf) for leaf in leaves]
    (device,) = leaves[0].devices()
    trees = tuple(
        structure.unflatten([jax.device_put(array[layer], device, may_alias=True) for array in arrays])
        for layer in range(len(arrays[0]))
    )
    return {**variables, "params": {**params, "language": {**params["language"], "layers": trees}}}


def is_unstacked(layers: Any) -> bool:
    """Returns whether the weights of the decoder's layers are from `unstack_layers`."""
    return isinstance(layers, tuple)


def _is_on_one_cpu(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and len(leaf.devices()) == 1 and leaf.devices().pop().platform == "cpu"
