"""Steps and bins of a stage, planned from measured examples."""

import dataclasses

import numpy as np
import pytest

from alignvlm_jax.data import planning
from alignvlm_jax.data.feeding import Feed
from alignvlm_jax.data.planning import plan_stage
from alignvlm_jax.errors import UserError
from tests.data.pages import PACKING, page, pages, reader


def _plan(examples, **options):
    return plan_stage(examples, progress=False, **{"global_batch": 16, **options})


def _numbers(examples, plan):
    """Returns the records in the batches of the complete stage."""
    feed = Feed(examples, range(PACKING.bins_per_microbatch), plan.microbatches, num_positions=plan.num_positions)
    batches = [next(feed) for _ in range(plan.steps)]
    feed.close()
    numbers = np.concatenate([batch["example_ids"].ravel() for batch in batches])
    return numbers[numbers >= 0]


@pytest.mark.parametrize("epochs", [1.0, 2.0, 2.5])
def test_epochs_use_every_example_equally_often_without_empty_steps(chat, epochs):
    examples = reader(pages(61), chat)
    plan = _plan(examples, epochs=epochs)
    assert plan.num_positions == round(61 * epochs)
    numbers = _numbers(examples, plan)
    assert len(numbers) == plan.num_positions
    seen = np.bincount(numbers, minlength=61)
    assert seen.min() >= int(epochs) and seen.max() <= -(-epochs // 1)
    assert len(_numbers(examples, dataclasses.replace(plan, steps=plan.steps - 1))) < plan.num_positions


def test_long_epochs_are_planned_from_the_mean(chat, monkeypatch):
    monkeypatch.setattr(planning, "_EPOCH_SAMPLE_SIZE", 200)
    examples = reader(pages(400), chat)
    plan = _plan(examples, epochs=2.0)
    assert plan.num_positions is None
    assert len(_numbers(examples, plan)) == pytest.approx(800, rel=0.05)


def test_a_step_has_the_microbatches_nearest_to_the_batch(chat):
    examples = reader(pages(100), chat)
    plans = [_plan(examples, steps=20, global_batch=batch) for batch in (1, 16, 64)]
    bins = PACKING.bins_per_microbatch * plans[0].examples_per_bin
    assert [plan.microbatches for plan in plans] == [1, max(1, round(16 / bins)), round(64 / bins)]
    assert all(plan.steps == 20 and plan.num_positions is None for plan in plans)
    assert len(_numbers(examples, plans[2])) == pytest.approx(20 * 64, rel=0.2)
    assert _plan(examples, steps=20, bins_per_step=12).microbatches == 3


def test_the_plan_is_the_same_in_every_process(chat):
    plans = [_plan(reader(pages(61), chat), epochs=1.5, threads=threads) for threads in (1, 4)]
    assert plans[0] == plans[1]


def test_plan_ignores_refused_examples(chat):
    records = pages(40)
    for record in records[::4]:
        record["image"] = b"not a picture"
    examples = reader(records, chat)
    assert len(_numbers(examples, _plan(examples, epochs=1.0))) == 30


def test_data_without_a_usable_example(chat):
    records = [{**page(i, np.random.default_rng(i)), "image": b""} for i in range(5)]
    for length in ({"steps": 3}, {"epochs": 1.0}):
        with pytest.raises(
            UserError, match="none of the .* examples measured .* page-. of documents/train: .* is empty"
        ):
            _plan(reader(records, chat), **length)
