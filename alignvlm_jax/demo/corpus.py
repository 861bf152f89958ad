"""Draws the documents that the demo trains on."""

import pathlib
from collections.abc import Mapping

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.data.synthetic.corpus import build_corpus
from alignvlm_jax.demo.output import show
from alignvlm_jax.locations import is_local

CORPUS = "documents"
"""Name of the demo's data set in the mixtures of a config."""

SIZES = {"train": 24_000, "validation": 300, "heldout": 300}
"""Pages per split. With three or four questions per page, these are about a thousand held-out questions."""

# Not the seed of the experiment, because runs with different seeds are compared on the same documents.
_SEED = 0


def draw_corpus(folder: pathlib.Path, sizes: Mapping[str, int] = SIZES) -> None:
    """Draws the documents into `folder`, unless it already holds the same documents."""
    build_corpus(folder, seed=_SEED, sizes=sizes)


def draw_missing_corpus(config: ExperimentConfig) -> None:
    """Draws the demo's documents if a config uses them and they do not exist. None are drawn into a bucket."""
    if not is_local(config.data.root):
        return
    folder = pathlib.Path(config.data.root) / CORPUS
    datasets = {part.dataset for stage in config.stages for part in stage.mixture}
    if CORPUS in datasets and not folder.exists():
        show(f"{folder} does not exist: drawing the demo's documents")
        draw_corpus(folder)
