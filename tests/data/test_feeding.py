"""The feed: the same batches for any number of hosts, workers and restarts, and no hang whatever goes wrong."""

import dataclasses
import hashlib
import json
import os
import signal
import threading
import time

import numpy as np
import pytest

from alignvlm_jax.data.examples import Part
from alignvlm_jax.data.feeding import Feed
from alignvlm_jax.data.packing import fill_fractions
from alignvlm_jax.errors import UserError
from tests.data.pages import PACKING, PER_TILE, mixed_records, page, pages, reader

ROWS = range(PACKING.bins_per_microbatch)
MICROBATCHES = 2


def parts():
    """Returns a mixture of both kinds of records, one of which is refused."""
    documents = pages(23)
    documents[5]["image"] = b"not a picture"
    conversations = Part("mixed/train", mixed_records(18), "conversation", 2.0)
    return [Part("documents/train", documents, "mixed", 1.0), conversations]


@pytest.fixture(scope="module")
def examples(chat):
    return reader(parts(), chat)


def read_batches(feed, count):
    """Returns the first `count` batches of a feed and the state after each; closes the feed."""
    batches, states = [], []
    try:
        for _ in range(count):
            batches.append(next(feed))
            states.append(json.loads(json.dumps(feed.state())))
    finally:
        feed.close()
    return batches, states


def digest(batch):
    hashed = hashlib.sha256()
    for name in sorted(batch):
        hashed.update(name.encode() + batch[name].tobytes())
    return hashed.hexdigest()


# Two epochs of the 41 records are 5 or 6 steps of about 16.
STEPS = 8


@pytest.fixture(scope="module")
def reference(examples):
    return read_batches(Feed(examples, ROWS, MICROBATCHES), STEPS)


def test_batches_hold_the_contents_of_the_records(reference, chat):
    batches, _ = reference
    documents, conversations = parts()
    for batch in batches[:2]:
        for k, row in np.ndindex(MICROBATCHES, len(ROWS)):
            b = {name: field[k, row] for name, field in batch.items()}
            members = b["example_ids"][b["example_ids"] >= 0]
            assert b["segment_ids"].max() == len(members) == b["num_examples"] > 0
            for segment, number in enumerate(members, start=1):
                here = b["segment_ids"] == segment
                learned = chat.decode(b["targets"][here][b["loss_weights"][here] > 0])
                if number < 23:
                    record = documents.records[number]
                    answers = sorted(record["answers"])
                    assert learned == record["transcription"] or sorted(learned) == sorted("".join(answers))
                    assert (b["tiles"][b["visual_index"][here].max() // PER_TILE, 0, 0] == number).all()
                else:
                    messages = json.loads(conversations.records[number - 23]["conversation"])
                    assert learned == "".join(m["content"] for m in messages if m["role"] == "assistant")


def test_steps_have_one_shape_and_well_filled_bins(reference):
    batches, _ = reference
    assert {batch["tokens"].shape for batch in batches} == {(MICROBATCHES, len(ROWS), PACKING.tokens_per_bin)}
    assert {batch["tiles"].dtype for batch in batches} == {np.dtype(np.uint8)}
    assert np.mean([max(fill_fractions(batch).values()) for batch in batches]) > 0.85


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_sees_the_same_batches(examples, reference, hosts):
    shares = np.split(np.array(ROWS), hosts)
    made = [read_batches(Feed(examples, share.tolist(), MICROBATCHES), STEPS) for share in shares]
    for step in range(STEPS):
        joined = {
            name: np.concatenate([batches[step][name] for batches, _ in made], axis=1) for name in reference[0][step]
        }
        assert digest(joined) == digest(reference[0][step])
        states = {row: state for _, states in made for row, state in states[step].items()}
        assert states == reference[1][step]


@pytest.mark.parametrize("options", [{"threads": 1, "prefetch": 1}, {"threads": 5, "prefetch": 7}, {"workers": 2}])
def test_any_number_of_workers_makes_the_same_batches(examples, reference, options):
    batches, states = read_batches(Feed(examples, ROWS, MICROBATCHES, **options), STEPS)
    assert list(map(digest, batches)) == list(map(digest, reference[0])) and states == reference[1]


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_resuming_at_any_step_is_exact(examples, reference, stop):
    hosts = np.split(np.array(ROWS), [0, 2, 4][stop % 3 :]) if stop % 2 else [np.array(ROWS)]
    for share in (share.tolist() for share in hosts if len(share)):
        batches, _ = read_batches(Feed(examples, share, MICROBATCHES, reference[1][stop - 1]), STEPS - stop)
        for batch, expected in zip(batches, reference[0][stop:], strict=True):
            assert digest(batch) == digest({name: field[:, share] for name, field in expected.items()})


def test_another_seed_is_another_order(examples, reference):
    (batch,), _ = read_batches(Feed(dataclasses.replace(examples, seed=4), ROWS, MICROBATCHES), 1)
    assert digest(batch) != digest(reference[0][0])


def test_an_order_that_ends_holds_every_example_once_an_epoch(chat):
    examples = reader(pages(30), chat)
    batches, _ = read_batches(Feed(examples, ROWS, MICROBATCHES, num_positions=60), 8)
    numbers = np.concatenate([batch["example_ids"].ravel() for batch in batches])
    np.testing.assert_array_equal(np.bincount(numbers[numbers >= 0], minlength=30), 2)
    assert not batches[-1]["segment_ids"].any() and (batches[-1]["tokens"] == chat.pad_id).all()


def test_refused_examples_are_counted_and_named(examples):
    feed = Feed(examples, ROWS, MICROBATCHES)
    batches = [next(feed) for _ in range(STEPS)]
    refused = feed.refused()
    assert {example.id for example in refused} == {"page-5"} and "not an image" in refused[0].reason
    assert sum(batch["num_refused"].sum() for batch in batches) == len(refused) > 0 and feed.refused() == []
    feed.close()
    # The counts do not depend on when a run stops: those of the second half are also counted after resuming.
    first = sum(batch["num_refused"].sum() for batch in batches[:4])
    _, states = read_batches(Feed(examples, ROWS, MICROBATCHES), 4)
    again, _ = read_batches(Feed(examples, ROWS, MICROBATCHES, states[-1]), STEPS - 4)
    assert first + sum(batch["num_refused"].sum() for batch in again) == len(refused)


def test_image_damaged_after_its_header_leaves_a_gap(chat):
    records = [page(i, np.random.default_rng(i), size=(40, 40)) for i in range(12)]
    records[3]["image"] = records[3]["image"][:-20]
    feed = Feed(reader(records, chat), ROWS, 1, num_positions=12)
    batches = [next(feed) for _ in range(3)]
    numbers = np.concatenate([batch["example_ids"].ravel() for batch in batches])
    assert sorted(numbers[numbers >= 0]) == [0, 1, 2, *range(4, 12)]
    (refused,) = feed.refused()
    assert refused.id == "page-3" and "damaged" in refused.reason
    feed.close()


def test_too_many_refusals_end_the_run_with_their_reasons(chat):
    records = [page(i, np.random.default_rng(i), size=(20, 20)) for i in range(40)]
    for record in records[::2]:
        record["image"] = b"not a picture"
    feed = Feed(reader(records, chat), ROWS, 1, max_refused=0.3)
    with pytest.raises(UserError, match=r"301 of \d+ examples .* more than the limit of 30.0% \(301 x image: not an"):
        for _ in range(1000):
            next(feed)
    with pytest.raises(UserError):
        next(feed)
    feed.close()


def test_an_error_in_the_records_ends_the_run(chat):
    class Broken(list):
        def __getitem__(self, index):
            if index == 7:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    feed = Feed(reader([Part("a", Broken(pages(10)), "qa")], chat), ROWS, 1)
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in range(10):
            next(feed)
    feed.close()


def test_signals_to_the_whole_job_do_not_end_workers_and_a_killed_one_ends_the_run(examples):
    import psutil

    before = set(psutil.Process().children(recursive=True))
    feed = Feed(examples, ROWS, MICROBATCHES, workers=2)

    def workers():
        found = set(psutil.Process().children(recursive=True)) - before
        return [child for child in found if "spawn_main" in " ".join(child.cmdline())]

    while len(workers()) < 2:  # while they start, and while they work
        time.sleep(0.005)
    for _ in range(5):
        for worker in workers():
            for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes by Ctrl-C and by Slurm
                os.kill(worker.pid, number)
        next(feed)
    workers = workers()
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    start_time = time.monotonic()
    with pytest.raises(UserError, match="a process that reads data was killed"):
        for _ in range(100):
            next(feed)
    assert time.monotonic() - start_time < 30
    feed.close()
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


def test_closing_ends_the_threads(examples):
    before = threading.active_count()
    feed = Feed(examples, ROWS, MICROBATCHES, threads=3)
    next(feed)
    feed.close()
    assert threading.active_count() == before


def test_state_of_other_rows_is_refused(examples, reference):
    with pytest.raises(UserError, match="no data state for row 2, only for rows 0, 1"):
        Feed(examples, [2], 1, {row: reference[1][0][row] for row in "01"})


def test_a_state_is_small(reference):
    assert len(json.dumps(reference[1][-1])) < 300 * len(ROWS)
