"""Layers that the encoder, the connectors and the decoder share.

Every parameter has logical axis names. The table in `parallel/sharding.py` maps them to a mesh.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignvlm_jax.models import rematerialization
from alignvlm_jax.ops.attention import AttentionMesh
from alignvlm_jax.ops.linear import linear
from alignvlm_jax.ops.vocabulary_streaming import VocabularyMesh

fan_in_init = nn.initializers.lecun_normal()


def param(module: nn.Module, name: str, init: Callable, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> Array:
    """Declares a float32 parameter with logical axis names, and returns it."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


class Dense(nn.Module):
    """Linear layer: `x @ kernel + bias` over the last axis, computed in `dtype`."""

    features: int
    axes: tuple[str, str]
    use_bias: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, inputs: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """Returns the outputs."""
        kernel = param(self, "kernel", fan_in_init, self.axes, (inputs.shape[-1], self.features))
        bias = param(self, "bias", nn.initializers.zeros, self.axes[1:], (self.features,)) if self.use_bias else None
        return linear(inputs.astype(self.dtype), kernel, bias)


class LayerNorm(nn.Module):
    """LayerNorm with learned scale and bias; statistics are float32, the result has the dtype of the input."""

    eps: float

    @nn.compact
    def __call__(self, inputs: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns the normalized inputs."""
        width = inputs.shape[-1]
        scale = param(self, "scale", nn.initializers.ones, ("norm",), (width,))
        bias = param(self, "bias", nn.initializers.zeros, ("norm",), (width,))
        return (standardize(inputs, self.eps) * scale + bias).astype(inputs.dtype)


class RMSNorm(nn.Module):
    """RMSNorm with learned scale; statistics are float32, the result has the dtype of the input."""

    eps: float

    @nn.compact
    def __call__(self, inputs: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns the normalized inputs."""
        scale = param(self, "scale", nn.initializers.ones, ("norm",), (inputs.shape[-1],))
        outputs = inputs.astype(jnp.float32)
        outputs *= jax.lax.rsqrt(jnp.mean(outputs**2, axis=-1, keepdims=True) + self.eps)
        return (outputs * scale).astype(inputs.dtype)


def standardize(inputs: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """Returns the inputs with zero mean and unit variance over the last axis, in float32."""
    inputs = inputs.astype(jnp.float32)
    inputs -= jnp.mean(inputs, axis=-1, keepdims=True)
    return inputs * jax.lax.rsqrt(jnp.mean(inputs**2, axis=-1, keepdims=True) + eps)


def constrain(inputs: Array, *axes: str | None) -> Array:
    """Constrains an activation to the sharding of its named axes. Does nothing outside `sharding.logical_rules`."""
    return nn.with_logical_constraint(inputs, axes)


def vocabulary_mesh() -> VocabularyMesh:
    """Returns the mesh axes that shard bins, vocabulary and widths. Empty outside of `sharding.logical_rules`."""
    return VocabularyMesh(*_mesh_axes("batch"), *_mesh_axes("vocab", "embed"))


def attention_mesh() -> AttentionMesh:
    """Returns the mesh axes that shard rows and heads. Empty outside of `sharding.logical_rules`."""
    return AttentionMesh(*_mesh_axes("batch", "heads"))


def _mesh_axes(*names: str) -> list[tuple[str, ...]]:
    # A logical axis maps to one mesh axis, to several or to none.
    mesh_axes = nn.logical_to_mesh_axes(names)
    return [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in mesh_axes]


class Parameters(nn.Module):
    """Holder of the parameters of a layer that is computed elsewhere, declared as name=(init, axes, shape)."""

    @nn.compact
    def __call__(self, **declared: tuple[Callable, tuple[str | None, ...], tuple[int, ...]]) -> dict[str, Array]:
        """Declares the parameters and returns them by name."""
        return {name: param(self, name, *declaration) for name, declaration in declared.items()}


def scan_layers(
    layer: type[nn.Module], num_layers: int, remat: str, in_axes: tuple, *, is_initializing: bool, unroll: bool = False
) -> type[nn.Module]:
    """Stacks `layer` `num_layers` times under one `nn.scan`, so that compile time does not grow with depth.

    Args:
      layer: a module called as `layer(carry, *inputs) -> (carry, outputs)`.
      num_layers: depth; parameters get a leading axis "layers" of this size.
      remat: values that the backward pass keeps, see `rematerialization.py`.
      in_axes: for each input after the carry, 0 (one slice per layer) or `nn.broadcast`.
      is_initializing: `is_initializing()` of the module that holds the layers.
      unroll: whether to compile each layer instead of a loop. The parameters stay stacked.

    Returns:
      A module class whose instances hold all layers.
    """
    # Inside a scan, the barriers of `prevent_cse` are not needed and only cost time (see `jax.checkpoint`).
    if remat != rematerialization.NONE:
        layer = nn.remat(layer, policy=rematerialization.policy(remat), prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=num_layers,
        unroll=num_layers if unroll else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
        # The check traces the layer a second time. The random numbers of the initial weights depend on that.
        check_constancy_invariants=is_initializing,
    )
