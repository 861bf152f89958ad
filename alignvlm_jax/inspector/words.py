"""Each patch in words: what ALIGN gives the language model for it.

Axes: M tiles, N patches of a tile, k words kept of each, D decoder width, S tile side.

P is never held: ALIGN passes over the vocabulary in blocks (`ops/vocabulary_attention.py`), a tile at a time here, and
keeps the k largest probabilities and the entropy of each patch.
"""

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.vocabulary import Variables
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig
from alignvlm_jax.models.connectors import CONNECTOR_CONFIGS, AlignConfig


@dataclasses.dataclass(frozen=True)
class PatchWords:
    """Of every patch of a page.

    visual: what the language model reads for it.
    entropy: of its distribution over words, in nats.
    ids: its k likeliest words, likeliest first.
    probabilities: theirs.
    """

    visual: Float[np.ndarray, "M N D"]
    entropy: Float[np.ndarray, "M N"]
    ids: Int[np.ndarray, "M N k"]
    probabilities: Float[np.ndarray, "M N k"]


def check_connector(config: AlignVLMConfig) -> None:
    """Raises a `UserError` unless the model says in words what it sees."""
    if isinstance(config.connector, AlignConfig):
        return
    name = next(name for name, kind in CONNECTOR_CONFIGS.items() if isinstance(config.connector, kind))
    raise UserError(
        f"the checkpoint's connector is {name}: it puts a patch anywhere, not among words, so there are no words to "
        "show. Only ALIGN has a distribution over words; take a checkpoint with config.model.connector=align"
    )


def patch_words(
    config: AlignVLMConfig,
    variables: Variables,
    tiles: UInt8[np.ndarray, "M S S 3"],
    tile_valid_hw: Int[np.ndarray, "M 2"],
    *,
    k: int,
    progress: bool = True,
) -> PatchWords:
    """What each patch of a page's tiles says.

    Args:
      config: of the model, whose connector is ALIGN.
      variables: of the model, as `inference.vocabulary` makes them.
      tiles: pixels.
      tile_valid_hw: the part of each tile that is picture.
      k: how many words of each patch to keep.
      progress: show a bar.
    """
    check_connector(config)
    found = []
    for i in tqdm(range(len(tiles)), "reading tiles", unit="tile", disable=not progress):
        of_tile = _describe(AlignVLM(config), variables, tiles[i], tile_valid_hw[i], k=k)
        found.append(jax.tree.map(np.asarray, of_tile))
    visual, entropy, probabilities, ids = (np.stack(of_tiles) for of_tiles in zip(*found, strict=True))
    return PatchWords(visual, entropy, ids, probabilities)


@functools.partial(jax.jit, static_argnames=("model", "k"))
def _describe(model: AlignVLM, variables: Variables, tile, valid_hw, *, k: int):
    def describe(model: AlignVLM):
        features = model.encode_features(tile[None, None], valid_hw[None, None])
        return model.connector.describe(features, model.language.embedding, top_k=k)

    visual, summary = model.apply(variables, method=describe)
    return visual[0], summary.entropy[0], summary.top_probabilities[0], summary.top_ids[0]
