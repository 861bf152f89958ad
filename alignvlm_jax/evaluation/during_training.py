"""Evaluation of a run during training.

`training.loop.train` calls the functions at regular intervals:

    train(config, workdir, score=during_training(config), answer=answers_during_training(config))
"""

from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.data import images, store
from alignvlm_jax.evaluation import runner
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.locations import join
from alignvlm_jax.models.alignvlm import Params
from alignvlm_jax.training.initial import load_tokenizer
from alignvlm_jax.training.tracking.tracker import ShownAnswer

_LARGEST_PAGE = 1024
"""Width and height in pixels above which the pages of shown answers are made smaller."""


def during_training(config: ExperimentConfig) -> Callable[[Params, Mesh], dict[str, float]] | None:
    """Returns a function that scores weights on their mesh by exact match, or None if the config requests no scores.

    With several processes, all of them have to call the function.

    Raises:
      UserError: if the data set does not exist. The error is raised here, before training begins.
    """
    settings = config.evaluation
    if settings.every_steps is None:
        return None
    records, read = _open_records(config), _reader_maker(config)

    def score(params: Params, mesh: Mesh) -> dict[str, float]:
        report = runner.evaluate(
            read(params, mesh),
            records,
            limit=settings.limit,
            max_new_tokens=settings.max_new_tokens,
            title=settings.split,
        )
        return {"exact_match": report.overall.exact_match}

    return score


def answers_during_training(config: ExperimentConfig) -> Callable[[Params, Mesh], list[ShownAnswer]] | None:
    """Returns a function that answers the first question about some pages, or None if the config requests no answers.

    The pages are the first of the split, so that the answers of later steps are about the same pages. With several
    processes, all of them have to call the function.

    Raises:
      UserError: if the data set does not exist. The error is raised here, before training begins.
    """
    settings = config.evaluation
    if settings.log_answers_every_steps is None:
        return None
    records, read = _open_records(config), _reader_maker(config)
    shown = [_first_question(records[index]) for index in range(min(len(records), settings.logged_answers))]

    def answer(params: Params, mesh: Mesh) -> list[ShownAnswer]:
        report = runner.evaluate(
            read(params, mesh),
            shown,
            limit=settings.logged_answers,
            max_new_tokens=settings.max_new_tokens,
            title=settings.split,
        )
        pages = {record["id"]: _page(record) for record in shown}
        return [
            ShownAnswer(pages[answer.document], answer.question, answer.expected, answer.predicted)
            for answer in report.answers
        ]

    return answer


def _open_records(config: ExperimentConfig) -> Sequence[runner.Record]:
    settings = config.evaluation
    folder = join(config.data.root, settings.dataset) if settings.dataset else runner.dataset_folder(config)
    return store.open_dataset(folder, settings.split)


def _reader_maker(config: ExperimentConfig) -> Callable[[Params, Mesh], Reader]:
    """Returns a function that makes a reader with given weights."""
    tokenizer, batch_size = load_tokenizer(config), config.evaluation.batch_size

    def make(params: Params, mesh: Mesh) -> Reader:
        # A new reader each time, because a reader caches statistics of the weights, which have changed.
        return Reader(config.model, params, tokenizer, config.data.tiling, batch_size=batch_size, mesh=mesh)

    return make


def _first_question(record: runner.Record) -> runner.Record:
    """Returns a document with its first question alone. Conversations stay as they are."""
    if "questions" not in record:
        return record
    return {**record, "questions": record["questions"][:1], "answers": record["answers"][:1]}


def _page(record: runner.Record) -> np.ndarray | None:
    """Returns the first image of a record, made smaller if it is large."""
    encoded = [record["image"]] if "image" in record else list(record.get("images", ()))
    if not encoded:
        return None
    page = images.open_image(encoded[0], name=record["id"])
    page.thumbnail((_LARGEST_PAGE, _LARGEST_PAGE))
    return np.asarray(page)
