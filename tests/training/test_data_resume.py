"""Training from data sets on disk: a run that is stopped and resumed uses exactly the same batches."""

import dataclasses
import io
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.run import CheckpointConfig
from alignvlm_jax.config.serialization import config_to_json
from alignvlm_jax.config.stages import MixturePart
from alignvlm_jax.data import store
from alignvlm_jax.data.packing import PackingConfig
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.data.prepare import FEATURES
from alignvlm_jax.data.synthetic.corpus import FEATURES as PAGE_FEATURES
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel.mesh import MeshConfig
from tests.data.nano_tokenizer import write_chat_folder
from tests.data.pages import mixed_records, pages
from tests.parallel import processes
from tests.parallel.tiny import MODEL
from tests.training.batches import stage
from tests.training.recording import train


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ExperimentConfig:
    """Two epochs over a mixture of prepared conversations, one of them with a damaged image, and pages."""
    root = tmp_path_factory.mktemp("data")
    records = mixed_records(18)
    records[3]["images"] = [b"not a picture"]
    store.write_dataset(root / "mixed", FEATURES, {"train": records})
    documents = [page | {"image": io.BytesIO(page["image"])} for page in pages(23)]
    store.write_dataset(root / "documents", PAGE_FEATURES, {"train": documents})
    mixture = (MixturePart("mixed"), MixturePart("documents", task="mixed"))
    packing = PackingConfig(tokens_per_bin=160, tiles_per_bin=8, bins_per_microbatch=4, examples_per_bin=8, window=6)
    return ExperimentConfig(
        model=dataclasses.replace(MODEL, language=dataclasses.replace(MODEL.language, vocab_size=352)),
        tokenizer=str(write_chat_folder(root / "tokenizer")),
        data=DataConfig(str(root), TilingConfig(tile_size=16, max_tiles=3), packing, max_refused=0.5),
        mesh=MeshConfig(data=4, fsdp=1, tensor=2),
        stages=(stage(mixture=mixture, steps=None, epochs=2.0, global_batch=16),),
        checkpoint=CheckpointConfig(every_steps=1, keep=100),
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, *train(config, workdir)


def test_epochs_are_complete_and_refusals_are_named(config, finished):
    workdir, result, recorded = finished
    digests = [digest for batch in recorded for digest in batch.values()]
    assert len(recorded) == result.progress.step >= 4 and len(digests) == 4 * len(recorded)
    assert len(set(digests)) >= len(digests) - 4, "no row is repeated, except for empty ones at the end"
    (line,) = (workdir / "data_refused.jsonl").read_text().splitlines()
    refused = json.loads(line)
    assert refused["id"] == "record-3" and refused["source"] == "mixed/train" and "not an image" in refused["reason"]


def test_a_stopped_and_resumed_run_uses_the_same_batches(config, finished, tmp_path):
    """The run is stopped once in each epoch; `tests/data/test_feeding.py` covers every step."""
    _, uninterrupted, expected = finished
    batches = []
    for session, stop in enumerate((1, len(expected) - 1, None)):

        def interrupt(step, stop=stop):
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        # The numbers of threads and of prefetched batches do not affect the result.
        data = dataclasses.replace(config.data, read_threads=1 + session, prefetch_batches=1 + session)
        result, recorded = train(dataclasses.replace(config, data=data), tmp_path / "run", on_step=interrupt)
        batches += recorded
    assert batches == expected
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(result.params), jax.device_get(uninterrupted.params))
    assert len((tmp_path / "run" / "data_refused.jsonl").read_text().splitlines()) == 1


def test_a_run_killed_between_checkpoints_repeats_the_batches(config, finished, tmp_path):
    workdir, uninterrupted, expected = finished
    shutil.copytree(workdir, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > 2:
            shutil.rmtree(path)
    # Data are made in a worker process this time, which must not change them.
    data = dataclasses.replace(config.data, workers=1)
    result, recorded = train(dataclasses.replace(config, data=data), tmp_path / "run")
    assert recorded == expected[2:]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(result.params), jax.device_get(uninterrupted.params))


def test_a_checkpoint_without_data_state_is_refused(config, finished, tmp_path, monkeypatch):
    workdir, _, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > 2:
            shutil.rmtree(path)
    monkeypatch.setattr(Checkpointer, "data_state", lambda *_: None)  # as in checkpoints of earlier versions
    with pytest.raises(UserError, match="step 2 does not say where the data were.*--init-from"):
        train(config, tmp_path / "run")


def test_a_task_that_does_not_fit_the_records_is_reported_before_training(config, tmp_path):
    wrong = dataclasses.replace(config.stages[0], name="second", mixture=(MixturePart("documents"),))
    with pytest.raises(UserError, match="documents/train: the task 'conversation' reads the field 'conversation'"):
        train(dataclasses.replace(config, stages=(config.stages[0], wrong)), tmp_path)


@pytest.mark.large
def test_several_processes_make_the_same_batches_as_one(config, finished, tmp_path):
    """Two processes start the run, four resume it, and one finishes it. Every row is made once, and is the same."""
    _, _, expected = finished
    (tmp_path / "config.json").write_text(config_to_json(config))
    batches = []
    for num_processes, stop in ((2, 1), (4, 3)):
        output = tmp_path / f"of{num_processes}"
        job = processes.start(
            output,
            "record_batches",
            num_processes,
            devices=8 // num_processes,
            config=str(tmp_path / "config.json"),
            workdir=str(tmp_path / "run"),
            output_file=[str(output / f"{i}.json") for i in range(num_processes)],
            stop_at=[stop] + [None] * (num_processes - 1),
        )
        assert processes.finish(job, seconds=600) == [0] * num_processes, job[0].text()
        recorded = [json.loads((output / f"{i}.json").read_text()) for i in range(num_processes)]
        for batch in zip(*recorded, strict=True):
            rows = {row: digest for process_rows in batch for row, digest in process_rows.items()}
            assert len(rows) == sum(map(len, batch)), "no row is made twice"
            batches.append(rows)
    assert 2 <= len(batches) < len(expected)
    batches += train(config, tmp_path / "run")[1]
    assert batches == expected
