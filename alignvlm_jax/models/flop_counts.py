"""Counts the FLOPs of matrix products in a training step, depending on which factors need a gradient.

The backward pass of a product costs its forward FLOPs once more for each factor that needs a gradient: for the weights
if their part is trained, and for the input if anything before it is trained. `training/flops.py` counts the encoder,
the decoder and the loss with these functions; each connector counts its own FLOPs (`models/connectors/`).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TrainedParts:
    """The parts of the model that a stage trains."""

    vision: bool
    connector: bool
    language: bool

    @property
    def any(self) -> bool:
        """True if anything is trained."""
        return self.vision or self.connector or self.language

    @property
    def before_decoder(self) -> bool:
        """True if the visual tokens need a gradient, because the encoder or the connector is trained."""
        return self.vision or self.connector

    def first_product(self, forward: float) -> float:
        """Returns the FLOPs of a connector's first product, of its weights and the encoder's features.

        Args:
          forward: FLOPs of the forward pass.
        """
        return product_flops(forward, weights=self.connector, inputs=self.vision)

    def later_product(self, forward: float) -> float:
        """Returns the FLOPs of a later product of a connector, of its weights and its own activations.

        Args:
          forward: FLOPs of the forward pass.
        """
        return product_flops(forward, weights=self.connector, inputs=self.before_decoder)


def product_flops(forward: float, *, weights: bool, inputs: bool) -> float:
    """Returns the FLOPs of a product, forward and backward.

    Args:
      forward: FLOPs of the forward pass.
      weights: whether the first factor needs a gradient.
      inputs: whether the second factor needs a gradient.
    """
    return forward * (1 + weights + inputs)
