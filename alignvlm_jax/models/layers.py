"""The pieces that the encoder, the connectors and the decoder share.

Every parameter carries logical axis names; `parallel/sharding.py` holds the one table that maps them to a mesh.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignvlm_jax.ops.attention import AttentionMesh
from alignvlm_jax.ops.linear import linear
from alignvlm_jax.ops.vocabulary_streaming import VocabularyMesh

fan_in_init = nn.initializers.lecun_normal()


def param(module: nn.Module, name: str, init: Callable, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> Array:
    """Declares a float32 parameter with logical axis names."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


class Dense(nn.Module):
    """`x @ kernel + bias` over the last axis, computed in `dtype`."""

    features: int
    axes: tuple[str, str]
    use_bias: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, inputs: Float[Array, "... i"]) -> Float[Array, "... o"]:
        kernel = param(self, "kernel", fan_in_init, self.axes, (inputs.shape[-1], self.features))
        bias = param(self, "bias", nn.initializers.zeros, self.axes[1:], (self.features,)) if self.use_bias else None
        return linear(inputs.astype(self.dtype), kernel, bias)


class LayerNorm(nn.Module):
    """LayerNorm with learned scale and bias; statistics in float32, the result in the dtype of the input."""

    eps: float

    @nn.compact
    def __call__(self, inputs: Float[Array, "... D"]) -> Float[Array, "... D"]:
        width = inputs.shape[-1]
        scale = param(self, "scale", nn.initializers.ones, ("norm",), (width,))
        bias = param(self, "bias", nn.initializers.zeros, ("norm",), (width,))
        return (standardize(inputs, self.eps) * scale + bias).astype(inputs.dtype)


class RMSNorm(nn.Module):
    """RMSNorm with learned scale; statistics in float32, the result in the dtype of the input."""

    eps: float

    @nn.compact
    def __call__(self, inputs: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = param(self, "scale", nn.initializers.ones, ("norm",), (inputs.shape[-1],))
        outputs = inputs.astype(jnp.float32)
        outputs *= jax.lax.rsqrt(jnp.mean(outputs**2, axis=-1, keepdims=True) + self.eps)
        return (outputs * scale).astype(inputs.dtype)


def standardize(inputs: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """Zero mean and unit variance over the last axis, in float32."""
    inputs = inputs.astype(jnp.float32)
    inputs -= jnp.mean(inputs, axis=-1, keepdims=True)
    return inputs * jax.lax.rsqrt(jnp.mean(inputs**2, axis=-1, keepdims=True) + eps)


def constrain(inputs: Array, *axes: str | None) -> Array:
    """Names the axes of an activation; without sharding rules in force this does nothing."""
    return nn.with_logical_constraint(inputs, axes)


def vocabulary_mesh() -> VocabularyMesh:
    """The mesh axes that cut bins, vocabulary and widths, by the sharding rules in force; without rules, none."""
    return VocabularyMesh(*_mesh_axes("batch"), *_mesh_axes("vocab", "embed"))


def attention_mesh() -> AttentionMesh:
    """The mesh axes that cut rows and heads, by the sharding rules in force; without rules, none."""
    return AttentionMesh(*_mesh_axes("batch", "heads"))


def _mesh_axes(*names: str) -> list[tuple[str, ...]]:
    cuts = nn.logical_to_mesh_axes(names)
    return [(cut,) if isinstance(cut, str) else tuple(cut or ()) for cut in cuts]


class Parameters(nn.Module):
    """Parameters under the name of a layer whose arithmetic is done elsewhere: name -> (init, axes, shape)."""

    @nn.compact
    def __call__(self, **declared: tuple[Callable, tuple[str | None, ...], tuple[int, ...]]) -> dict[str, Array]:
        return {name: param(self, name, *declaration) for name, declaration in declared.items()}


def remat_policy(name: str) -> Callable | None:
    """The rematerialisation policy called `name`: "full" keeps nothing, "dots" keeps matrix products."""
    return {"full": jax.checkpoint_policies.nothing_saveable, "dots": jax.checkpoint_policies.dots_saveable}[name]


def scan_layers(layer: type[nn.Module], num_layers: int, remat: str, in_axes: tuple) -> type[nn.Module]:
    """Stacks `layer` `num_layers` times under one `nn.scan`, so that compile time does not grow with depth.

    Args:
      layer: a module called as `layer(carry, *inputs) -> (carry, outputs)`.
      num_layers: depth; parameters get a leading axis "layers" of this size.
      remat: "none", "dots" or "full": what is recomputed in the backward pass.
      in_axes: for each of the inputs after the carry, 0 (one slice a layer) or `nn.broadcast`.

    Returns:
      A module class whose instances hold all layers.
    """
    if remat != "none":
        layer = nn.remat(layer, policy=remat_policy(remat), prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
