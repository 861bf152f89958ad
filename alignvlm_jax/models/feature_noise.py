"""Gaussian noise on what the connector reads (arXiv 2502.01341): there only where a caller brings it.

Axes: B rows, M tiles per row, S tile side, N features per tile, d encoder width.

    noisy = {**variables, "perturbation": {"features": FeatureNoise.of(sigma=3.0, seed=0)}}
    AlignVLM(config).apply(noisy, batch, cache, method="prefill")

A tile's noise is a function of the seed and of its pixels: the same in every batch and for every question about it, so
that an answer still does not depend on what else is in the batch. At every sigma a seed gives the same noise, scaled.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8, UInt32


@flax.struct.dataclass
class FeatureNoise:
    """Attributes:
    sigma: standard deviation, in the features' own units.
    seed: what is drawn.
    """

    sigma: Float[Array, ""]
    seed: UInt32[Array, ""]

    @classmethod
    def of(cls, sigma: float, seed: int) -> "FeatureNoise":
        """From plain numbers."""
        return cls(jnp.float32(sigma), jnp.uint32(seed))

    def add_to(
        self, features: Float[Array, "B*M N d"], tiles: UInt8[Array, "B M S S 3"]
    ) -> Float[Array, "B*M N d"]:
        """The features of tiles, with noise."""
        key = jax.random.key(self.seed)
        keys = jax.vmap(lambda digest: jax.random.fold_in(key, digest))(_digests(tiles))
        noise = jax.vmap(lambda key: jax.random.normal(key, features.shape[1:]))(keys)
        return (features + self.sigma * noise).astype(features.dtype)


def _digests(tiles: UInt8[Array, "B M S S 3"]) -> UInt32[Array, "B*M"]:
    """A number for each tile; two that differ share it once in 2^32."""
    pixels = tiles.reshape(tiles.shape[0] * tiles.shape[1], -1).astype(jnp.uint32)
    factors = jax.random.bits(jax.random.key(0), pixels.shape[1:], jnp.uint32)
    return jnp.sum((pixels + 1) * factors, axis=1, dtype=jnp.uint32)
