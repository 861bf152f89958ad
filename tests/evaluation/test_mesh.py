"""Scoring on a mesh: the predictions are those of one device, whether a checkpoint is scored or a run in training."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from alignvlm_jax.checkpoints.weights import write_checkpoint
from alignvlm_jax.config.run import EvaluationConfig
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.synthetic.corpus import build_corpus
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation import runner
from alignvlm_jax.evaluation.benchmarks.runner import evaluate_benchmarks
from alignvlm_jax.evaluation.during_training import during_training
from alignvlm_jax.models.alignvlm import random_parameters
from alignvlm_jax.parallel.mesh import MeshConfig
from tests.data.nano_tokenizer import write_chat_folder
from tests.evaluation.benchmarks.drawn import write_docdownstream
from tests.parallel import processes, tiny
from tests.training import batches

CUBE = (2, 2, 2)
QUESTIONS = 10


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A tiny ALIGN that knows a tokenizer's words, and documents to ask it about."""
    folder = tmp_path_factory.mktemp("experiment")
    tokenizer = write_chat_folder(folder / "tokenizer")
    build_corpus(folder / "documents", seed=0, sizes={"validation": 6}, progress=False)
    model = dataclasses.replace(
        tiny.MODEL,
        connector=dataclasses.replace(batches.MODEL.connector, vocab_scale_init=8.0),
        language=dataclasses.replace(
            tiny.MODEL.language,
            vocab_size=ChatTokenizer.from_folder(tokenizer).vocab_size // 2 * 2 + 2,
            max_position_embeddings=512,
        ),
    )
    config = tiny.config(CUBE, model=model)
    return dataclasses.replace(
        config,
        tokenizer=str(tokenizer),
        data=dataclasses.replace(config.data, root=str(folder)),
        evaluation=EvaluationConfig(every_steps=2, limit=QUESTIONS, batch_size=6, max_new_tokens=4),
    )


@pytest.fixture(scope="module")
def written(experiment, tmp_path_factory):
    """A checkpoint with weights that have opinions, and what it answers on one device."""
    folder = tmp_path_factory.mktemp("written")
    draw = jax.jit(lambda rng: jax.tree.map(lambda leaf: leaf * 4, nn.unbox(random_parameters(experiment.model, rng))))
    tokenizer = ChatTokenizer.from_folder(experiment.tokenizer)
    write_checkpoint(folder / "run", experiment, draw(jax.random.key(0)), tokenizer, history=[])
    return folder / "run", predictions(folder / "run", folder / "alone.jsonl")


def predictions(run, file, mesh=None):
    runner.evaluate_checkpoint(run, split="validation", limit=QUESTIONS, mesh=mesh, predictions_file=file, batch_size=6)
    return file.read_text()


def test_a_mesh_predicts_what_one_device_does(written, tmp_path):
    run, alone = written
    assert alone.count("\n") == QUESTIONS and len({line.split('"predicted"')[1] for line in alone.splitlines()}) > 1
    assert predictions(run, tmp_path / "cube.jsonl", MeshConfig(*CUBE)) == alone


def test_views_on_a_mesh(written, tmp_path):
    # All views of a page lie on one device: six rows are three pages of two, spread over four.
    run, once = written
    answers = []
    for name, mesh in (("alone", None), ("cube", MeshConfig(*CUBE))):
        file = tmp_path / f"{name}.jsonl"
        options = dict(split="validation", limit=QUESTIONS, batch_size=6, views=2)
        runner.evaluate_checkpoint(run, mesh=mesh, predictions_file=file, **options)
        answers.append(file.read_text())
    assert answers[0] == answers[1] != once


def test_benchmarks_on_a_mesh(written, tmp_path):
    run, _ = written
    write_docdownstream(tmp_path / "data", tmp_path, pages=4)
    answers = []
    for mesh in (None, MeshConfig(*CUBE)):
        file = tmp_path / f"{mesh is None}.jsonl"
        evaluate_benchmarks(
            run, ["docvqa"], data=tmp_path / "data", limit=6, batch_size=6, mesh=mesh, predictions_file=file
        )
        answers.append(file.read_text())
    assert answers[0] == answers[1] and answers[0].count("\n") == 7


@pytest.mark.large
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 4, 2), (4, 1, 2)])
def test_every_mesh_predicts_what_one_device_does(written, tmp_path, shape):
    run, alone = written
    assert predictions(run, tmp_path / "mesh.jsonl", MeshConfig(*shape)) == alone


@pytest.mark.large
@pytest.mark.parametrize("number", [2, 4])
def test_several_processes_predict_what_one_does(written, tmp_path, experiment, number):
    run, alone = written
    arguments = dict(checkpoint=str(run), data=f"{experiment.data.root}/documents", limit=QUESTIONS)
    several = processes.start(
        tmp_path / "out", "evaluate", number, predictions=str(tmp_path / "several.jsonl"), **arguments
    )
    assert processes.finish(several) == [0] * number, several[0].text()
    assert (tmp_path / "several.jsonl").read_text() == alone
    assert [process.text().count("exact match") for process in several] == [1] + [0] * (number - 1)


@pytest.mark.large
def test_benchmarks_in_several_processes(written, tmp_path):
    run, _ = written
    write_docdownstream(tmp_path / "data", tmp_path, pages=4)
    files = [tmp_path / "alone.jsonl", tmp_path / "several.jsonl"]
    options = dict(data=str(tmp_path / "data"), limit=6, batch_size=6)
    evaluate_benchmarks(run, ["docvqa"], predictions_file=files[0], **options)
    several = processes.start(
        tmp_path / "out", "benchmarks", 2, checkpoint=str(run), name="docvqa", predictions=str(files[1]), **options
    )
    assert processes.finish(several) == [0, 0], several[0].text()
    assert files[0].read_text() == files[1].read_text()
    assert [process.text().count("ANLS") for process in several] == [1, 0]


def test_scoring_in_training_changes_nothing(experiment, tmp_path, capsys):
    losses = {}
    never = dataclasses.replace(experiment, evaluation=EvaluationConfig())
    assert during_training(never) is None
    without = tiny.train(tmp_path / "without", never, losses=losses, made=[])
    score, seen = during_training(experiment), []

    def watched(params, mesh):
        assert params["language"]["embedding"].sharding.spec == jax.P("tensor", "fsdp"), "scored where they lie"
        seen.append(score(params, mesh))
        return seen[-1]

    scored_losses = {}
    scored = tiny.train(tmp_path / "with", experiment, losses=scored_losses, made=[], score=watched)
    assert scored_losses == losses
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(scored.params), jax.device_get(without.params))
    assert len(seen) == 2 and all(0 <= figures["exact_match"] <= 1 for figures in seen)
    (events,) = (tmp_path / "with" / "tensorboard").iterdir()
    assert b"validation/exact_match" in events.read_bytes()
    assert "step 2 validation | exact match 0." in capsys.readouterr().out


def test_documents_that_are_missing_are_said_before_training(experiment):
    elsewhere = dataclasses.replace(experiment.evaluation, dataset="nothing")
    with pytest.raises(UserError, match="nothing"):
        during_training(dataclasses.replace(experiment, evaluation=elsewhere))
