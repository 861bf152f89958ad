"""Evaluation of a run during training.

`training.loop.train` calls the score function at regular intervals:

    train(config, workdir, score=during_training(config))
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
    """Returns a function that scores weights on their mesh by exact match, or None if the config requests no scores.

    With several processes, all of them have to call the function.

    Raises:
      UserError: if the data set does not exist. The error is raised here, before training begins.
    """
    settings = config.evaluation
    if settings.every_steps is None:
        return None
    folder = Path(config.data.root) / settings.dataset if settings.dataset else runner.dataset_folder(config)
    records, tokenizer = store.open_dataset(folder, settings.split), load_tokenizer(config)

    def score(params: Params, mesh: Mesh) -> dict[str, float]:
        # A new reader each time, because a reader caches statistics of the weights, which have changed.
        reader = Reader(config.model, params, tokenizer, config.data.tiling, batch_size=settings.batch_size, mesh=mesh)
        report = runner.evaluate(
            reader, records, limit=settings.limit, max_new_tokens=settings.max_new_tokens, title=settings.split
        )
        return {"exact_match": report.overall.exact_match}

    return score
