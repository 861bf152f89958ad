"""The words of each patch: the distribution that ALIGN computes over the vocabulary. A word is a token of it.

Axes: M tiles, N patches per tile, k words kept per patch, D model width, S tile side.

P itself is never stored. ALIGN processes one tile at a time, in blocks of the vocabulary
(`ops/vocabulary_attention.py`), and keeps the k largest probabilities and the entropy of each patch.
"""

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.vocabulary import Variables
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig
from alignvlm_jax.models.connectors import AlignConfig, connector_spec
from alignvlm_jax.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class PatchWords:
    """The words of every patch of a page.

    Attributes:
      visual: embedding that the language model reads for each patch.
      entropy: entropy of each patch's distribution over words, in nats.
      ids: the k likeliest words, likeliest first.
      probabilities: probabilities of these words.
    """

    visual: Float[np.ndarray, "M N D"]
    entropy: Float[np.ndarray, "M N"]
    ids: Int[np.ndarray, "M N k"]
    probabilities: Float[np.ndarray, "M N k"]


def check_connector(config: AlignVLMConfig) -> None:
    """Checks that the model describes a patch in words.

    Raises:
      UserError: if the connector is not ALIGN.
    """
    if isinstance(config.connector, AlignConfig):
        return
    name = connector_spec(config.connector).name
    raise UserError(
        f"the checkpoint's connector is {name}, which maps a patch to an arbitrary vector: there are no words to show. "
        "Only ALIGN has a distribution over words; use a checkpoint trained with config.model.connector=align"
    )


@ordinary_modes()
def patch_words(
    config: AlignVLMConfig,
    variables: Variables,
    tiles: UInt8[np.ndarray, "M S S 3"],
    tile_valid_hw: Int[np.ndarray, "M 2"],
    *,
    k: int,
    progress: bool = True,
) -> PatchWords:
    """Returns the words of each patch of a page's tiles.

    Args:
      config: config of a model whose connector is ALIGN.
      variables: model variables, as returned by `inference.vocabulary`.
      tiles: pixels.
      tile_valid_hw: size of the part of each tile that is image and not padding.
      k: number of words to keep per patch.
      progress: show a progress bar.

    Raises:
      UserError: if the connector is not ALIGN.
    """
    check_connector(config)
    descriptions = []
    for i in progress_bar(range(len(tiles)), "reading tiles", unit="tile", show=progress):
        description = _describe(AlignVLM(config), variables, tiles[i], tile_valid_hw[i], k=k)
        # One tile's results leave the device before the next tile is processed.
        descriptions.append(jax.tree.map(np.asarray, description))
    visual, entropy, probabilities, ids = (np.stack(arrays) for arrays in zip(*descriptions, strict=True))
    return PatchWords(visual, entropy, ids, probabilities)


@functools.partial(jax.jit, static_argnames=("model", "k"))
def _describe(model: AlignVLM, variables: Variables, tile, valid_hw, *, k: int):
    """Returns visual tokens, entropy, top probabilities and top ids of one tile's patches."""

    def describe(model: AlignVLM):
        features = model.encode_features(tile[None, None], valid_hw[None, None])
        return model.connector.describe(features, model.language.embedding, top_k=k)

    visual, summary = model.apply(variables, method=describe)
    return visual[0], summary.entropy[0], summary.top_probabilities[0], summary.top_ids[0]
