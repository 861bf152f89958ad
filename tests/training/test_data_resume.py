"""Training from data sets on disk: stopped at any step and gone on with, the very same batches follow."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import signal

import flax.linen as nn
import jax
import numpy as np
import pytest

from alignvlm_jax.config import CheckpointConfig, ExperimentConfig
from alignvlm_jax.data import store
from alignvlm_jax.data.packing import PackingConfig
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.data.prepare import FEATURES
from alignvlm_jax.data.synthetic.corpus import FEATURES as PAGE_FEATURES
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import random_parameters
from alignvlm_jax.parallel.mesh import MeshConfig
from alignvlm_jax.training import loop
from alignvlm_jax.training.stages import MixturePart
from tests.data.nano_tokenizer import write_chat_folder
from tests.data.pages import mixed_records, pages
from tests.training.batches import MODEL, stage


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ExperimentConfig:
    """Two epochs of a mixture of prepared conversations, one of them damaged, and of pages."""
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


class Watched(loop.ExperimentData):
    """Notes what is in each batch."""

    seen: list[str]

    def batches(self, *arguments):
        iterator = super().batches(*arguments)
        after = type(iterator).__next__

        class Noting(type(iterator)):
            def __next__(self):
                batch = after(self)
                hashed = hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch)))
                Watched.seen.append(hashed.hexdigest())
                return batch

        iterator.__class__ = Noting
        return iterator


def train(config, workdir, **options):
    """The result, and the hash of every batch that was trained on."""
    Watched.seen = []

    def make_params(config):
        return nn.unbox(jax.jit(lambda: random_parameters(config.model, jax.random.key(0)))())

    try:
        result = loop.train(config, workdir, open_data=Watched, make_params=make_params, **options)
    except KeyboardInterrupt:
        result = None
    return result, Watched.seen


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, *train(config, workdir)


def test_epochs_are_seen_whole_and_refusals_are_named(config, finished):
    workdir, result, seen = finished
    assert len(set(seen)) == len(seen) == result.progress.step >= 4
    (line,) = (workdir / "data_refused.jsonl").read_text().splitlines()
    refused = json.loads(line)
    assert refused["id"] == "record-3" and refused["source"] == "mixed/train" and "not an image" in refused["reason"]


def test_stopped_and_gone_on_with_the_same_batches_follow(config, finished, tmp_path):
    """Within the first epoch and within the second; `tests/data/test_feeding.py` has every step."""
    _, whole, expected = finished
    all_seen = []
    for sitting, stop in enumerate((1, len(expected) - 1, None)):

        def interrupt(step, stop=stop):
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        # Threads and what is made ahead are no part of the outcome.
        data = dataclasses.replace(config.data, read_threads=1 + sitting, prefetch_batches=1 + sitting)
        result, seen = train(dataclasses.replace(config, data=data), tmp_path / "run", on_step=interrupt)
        all_seen += seen
    assert all_seen == expected
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(result.params), jax.device_get(whole.params))
    assert len((tmp_path / "run" / "data_refused.jsonl").read_text().splitlines()) == 1


def test_killed_between_checkpoints_the_batches_come_again(config, finished, tmp_path):
    workdir, whole, expected = finished
    shutil.copytree(workdir, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > 2:
            shutil.rmtree(path)
    data = dataclasses.replace(config.data, workers=1)
    result, seen = train(dataclasses.replace(config, data=data), tmp_path / "run")
    assert seen == expected[2:]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(result.params), jax.device_get(whole.params))


def test_a_checkpoint_that_does_not_say_where_the_data_were(config, finished, tmp_path):
    workdir, _, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > 2:
            shutil.rmtree(path)
    meta = tmp_path / "run" / "checkpoints" / "2" / "meta" / "metadata"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"data": None}))
    with pytest.raises(UserError, match="step 2 does not say where the data were.*--init-from"):
        train(config, tmp_path / "run")


def test_a_task_that_does_not_fit_the_records_is_said_before_anything_is_trained(config, tmp_path):
    wrong = dataclasses.replace(config.stages[0], name="second", mixture=(MixturePart("documents"),))
    with pytest.raises(UserError, match="documents/train: the task 'conversation' reads the field 'conversation'"):
        train(dataclasses.replace(config, stages=(config.stages[0], wrong)), tmp_path)
