"""Output of every connector."""

import flax.struct
from jaxtyping import Array, Float


@flax.struct.dataclass
class ConnectorOutput:
    """Visual tokens, and the entropy of their distributions over words.

    Attributes:
      tokens: inputs of the decoder.
      entropy: entropy in nats of each token's distribution over words; None for connectors without such a distribution.
    """

    tokens: Float[Array, "B N D"]
    entropy: Float[Array, "B N"] | None = None
