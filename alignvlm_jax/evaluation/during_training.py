"""Scores the weights of a run while it trains: what `training.loop.train` calls every so many steps.

loop.train(config, workdir, score=during_training(config))
"""

from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.data import store
from alignvlm_jax.evaluation import runner
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.models.alignvlm import Params
from alignvlm_jax.training.initial import load_tokenizer


def during_training(config: ExperimentConfig) -> Callable[[Params, Mesh], dict[str, float]] | None:
    """A function from weights, where they lie on a mesh, to figures: the share of exact matches.

    None if `config.evaluation` asks for nothing. With several processes all of them call the function.

    Raises:
      UserError: there is no such data set, before training begins.
    """
    asked = config.evaluation
    if asked.every_steps is None:
        return None
    folder = Path(config.data.root) / asked.dataset if asked.dataset else runner.dataset_folder(config)
    records, tokenizer = store.open_dataset(folder, asked.split), load_tokenizer(config)

    def score(params: Params, mesh: Mesh) -> dict[str, float]:
        reader = Reader(config.model, params, tokenizer, config.data.tiling, batch_size=asked.batch_size, mesh=mesh)
        report = runner.evaluate(
            reader, records, limit=asked.limit, max_new_tokens=asked.max_new_tokens, title=asked.split
        )
        return {"exact_match": report.overall.exact_match}

    return score
