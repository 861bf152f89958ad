"""Writes a pruned model as a checkpoint."""

import dataclasses
import os

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float64

from alignvlm_jax.analysis.vocabulary.measure import Statistics
from alignvlm_jax.backbones import trained_model
from alignvlm_jax.checkpoints.exported import is_alignvlm_folder
from alignvlm_jax.checkpoints.weights import (
    ParameterReader,
    history_of_run,
    read_page_scale,
    restore_params_into,
    write_checkpoint,
)
from alignvlm_jax.config.serialization import config_to_dict
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.inference.vocabulary import prune_vocabulary
from alignvlm_jax.interop.assemble import abstract_parameters
from alignvlm_jax.interop.import_pytorch import read_alignvlm


def save_pruned(
    checkpoint: str | os.PathLike,
    usage: Float64[np.ndarray, " V"],
    k: int,
    out: str | os.PathLike,
    *,
    statistics: Statistics = "full",
) -> None:
    """Writes a checkpoint pruned to its k most used words as a workdir, with weights in their stored dtypes.

    `load`, `alignvlm ask`, `alignvlm eval` and `alignvlm export` accept the result. Training refuses it.

    Args:
      checkpoint: as for `inference.reader.load`.
      usage: from `mean_distribution` of this checkpoint.
      k: number of words to keep.
      out: output folder; must be empty or not exist yet.
      statistics: as for `inference.vocabulary.prune_vocabulary`.
    """
    # Load the weights, and the history that records their origin.
    folder = trained_model(checkpoint)
    if is_alignvlm_folder(folder):
        exported = read_alignvlm(folder)
        config, params, tokenizer, history = exported.config, exported.params, exported.tokenizer, exported.history
        scale = exported.page_scale
        if exported.progress.step:
            progress, trained = dataclasses.asdict(exported.progress), config_to_dict(config)
            history = [*history, {"what": "trained", "progress": progress, "config": trained}]
    else:
        source = ParameterReader(folder)
        config, tokenizer = source.config, ChatTokenizer.from_folder(source.tokenizer_folder)
        # Restore each array in the dtype in which it is stored: pruning must not change the weights it keeps.
        abstract = flatten_dict(abstract_parameters(config.model), sep="/")
        stored = {path: leaf.update(dtype=source.dtypes[path]) for path, leaf in abstract.items()}
        params = restore_params_into(folder, unflatten_dict(stored, sep="/"))
        history, scale = history_of_run(folder), read_page_scale(folder)
    num_words = len(usage)
    model, params = prune_vocabulary(config.model, params, usage, k, statistics=statistics)
    event = {"what": "pruned", "words kept": k, "of": num_words, "statistics of LN_V": f"{statistics} vocabulary"}
    config = dataclasses.replace(config, model=model)
    write_checkpoint(out, config, params, tokenizer, history=[*history, event], page_scale=scale)
