"""Gaussian noise on the features that the connector reads (arXiv 2502.01341), added only if a caller passes it.

Axes: B rows, M tiles per row, S tile side, N features per tile, d encoder width.

    noisy = {**variables, "perturbation": {"features": FeatureNoise.create(sigma=3.0, seed=0)}}
    AlignVLM(config).apply(noisy, batch, cache, method="prefill")

The noise of a tile is a function of the seed and of the tile's pixels. It is the same in every batch and for every
question about the tile, so an answer does not depend on the rest of the batch. For one seed, the noise at two sigmas
differs only by a factor.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8, UInt32


@flax.struct.dataclass
class FeatureNoise:
    """Settings of the noise, as arrays, so that they can be inputs of a compiled function.

    Attributes:
      sigma: standard deviation, in the units of the features.
      seed: seed of the noise.
    """

    sigma: Float[Array, ""]
    seed: UInt32[Array, ""]

    @classmethod
    def create(cls, sigma: float, seed: int) -> "FeatureNoise":
        """Returns the settings, given plain numbers."""
        return cls(jnp.float32(sigma), jnp.uint32(seed))

    def add_to(self, features: Float[Array, "B*M N d"], tiles: UInt8[Array, "B M S S 3"]) -> Float[Array, "B*M N d"]:
        """Returns the features of tiles with noise added."""
        key = jax.random.key(self.seed)
        keys = jax.vmap(lambda digest: jax.random.fold_in(key, digest))(_digests(tiles))
        noise = jax.vmap(lambda key: jax.random.normal(key, features.shape[1:]))(keys)
        return (features + self.sigma * noise).astype(features.dtype)


def _digests(tiles: UInt8[Array, "B M S S 3"]) -> UInt32[Array, " B*M"]:
    """Returns a hash of each tile; two different tiles have the same hash with a probability of 2^-32."""
    # A sum with random factors, modulo 2^32. Adding 1 gives a black tile a random hash, too.
    pixels = tiles.reshape(tiles.shape[0] * tiles.shape[1], -1).astype(jnp.uint32)
    factors = jax.random.bits(jax.random.key(0), pixels.shape[1:], jnp.uint32)
    return jnp.sum((pixels + 1) * factors, axis=1, dtype=jnp.uint32)
