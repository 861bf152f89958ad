"""Tests of evaluation on a mesh, of a checkpoint and during training: the predictions equal those of one device."""

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
from alignvlm_jax.evaluation.during_training import answers_during_training, during_training
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
    """Configuration of a tiny ALIGN with a tokenizer's vocabulary, and documents to evaluate it on."""
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
        evaluation=EvaluationConfig(
            every_steps=2,
            limit=QUESTIONS,
            batch_size=6,
            max_new_tokens=4,
            log_answers_every_steps=3,
            logged_answers=6,
        ),
    )


@pytest.fixture(scope="module")
def checkpoint(experiment, tmp_path_factory):
    """A checkpoint whose large weights give varied answers, and its predictions on one device."""
    folder = tmp_path_factory.mktemp("checkpoint")
    draw = jax.jit(lambda rng: jax.tree.map(lambda leaf: leaf * 4, nn.unbox(random_parameters(experiment.model, rng))))
    tokenizer = ChatTokenizer.from_folder(experiment.tokenizer)
    write_checkpoint(folder / "run", experiment, draw(jax.random.key(0)), tokenizer, history=[])
    return folder / "run", predict(folder / "run", folder / "one_device.jsonl")


def predict(run, file, mesh=None):
    """Returns the predictions of a checkpoint on a mesh, as JSON lines."""
    runner.evaluate_checkpoint(run, split="validation", limit=QUESTIONS, mesh=mesh, predictions_file=file, batch_size=6)
    return file.read_text()


def test_a_mesh_predicts_the_same_as_one_device(checkpoint, tmp_path):
    run, one_device = checkpoint
    assert (
        one_device.count("\n") == QUESTIONS
        and len({line.split('"predicted"')[1] for line in one_device.splitlines()}) > 1
    )
    assert predict(run, tmp_path / "cube.jsonl", MeshConfig(*CUBE)) == one_device


def test_views_on_a_mesh(checkpoint, tmp_path):
    # All views of a page are on one device: six rows are three pages with two views each, on four devices.
    run, one_view = checkpoint
    answers = []
    for name, mesh in (("one_device", None), ("cube", MeshConfig(*CUBE))):
        file = tmp_path / f"{name}.jsonl"
        options = dict(split="validation", limit=QUESTIONS, batch_size=6, views=2)
        runner.evaluate_checkpoint(run, mesh=mesh, predictions_file=file, **options)
        answers.append(file.read_text())
    assert answers[0] == answers[1] != one_view


def test_benchmarks_on_a_mesh(checkpoint, tmp_path):
    run, _ = checkpoint
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
def test_every_mesh_predicts_the_same_as_one_device(checkpoint, tmp_path, shape):
    run, one_device = checkpoint
    assert predict(run, tmp_path / "mesh.jsonl", MeshConfig(*shape)) == one_device


@pytest.mark.large
@pytest.mark.parametrize("number", [2, 4])
def test_several_processes_predict_the_same_as_one(checkpoint, tmp_path, experiment, number):
    run, one_device = checkpoint
    arguments = dict(checkpoint=str(run), data=f"{experiment.data.root}/documents", limit=QUESTIONS)
    workers = processes.start(
        tmp_path / "out", "evaluate", number, predictions=str(tmp_path / "several.jsonl"), **arguments
    )
    assert processes.finish(workers) == [0] * number, workers[0].text()
    assert (tmp_path / "several.jsonl").read_text() == one_device
    assert [process.text().count("exact match") for process in workers] == [1] + [0] * (number - 1)


@pytest.mark.large
def test_benchmarks_in_several_processes(checkpoint, tmp_path):
    run, _ = checkpoint
    write_docdownstream(tmp_path / "data", tmp_path, pages=4)
    files = [tmp_path / "one_device.jsonl", tmp_path / "several.jsonl"]
    options = dict(data=str(tmp_path / "data"), limit=6, batch_size=6)
    evaluate_benchmarks(run, ["docvqa"], predictions_file=files[0], **options)
    workers = processes.start(
        tmp_path / "out", "benchmarks", 2, checkpoint=str(run), name="docvqa", predictions=str(files[1]), **options
    )
    assert processes.finish(workers) == [0, 0], workers[0].text()
    assert files[0].read_text() == files[1].read_text()
    assert [process.text().count("ANLS") for process in workers] == [1, 0]


def test_evaluation_during_training_does_not_change_it(experiment, tmp_path, capsys):
    losses = {}
    no_evaluation = dataclasses.replace(experiment, evaluation=EvaluationConfig())
    assert during_training(no_evaluation) is None and answers_during_training(no_evaluation) is None
    without = tiny.train(tmp_path / "without", no_evaluation, losses=losses, examples=[])
    score, scores = during_training(experiment), []

    def recording_score(params, mesh):
        assert params["language"]["embedding"].sharding.spec == jax.P("tensor", "fsdp"), "scored on their mesh"
        scores.append(score(params, mesh))
        return scores[-1]

    scored_losses = {}
    functions = dict(score=recording_score, answer=answers_during_training(experiment))
    scored = tiny.train(tmp_path / "with", experiment, losses=scored_losses, examples=[], **functions)
    assert scored_losses == losses
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(scored.params), jax.device_get(without.params))
    assert len(scores) == 2 and all(0 <= figures["exact_match"] <= 1 for figures in scores)
    (events,) = (tmp_path / "with" / "tensorboard").iterdir()
    recorded = events.read_bytes()
    assert b"validation/exact_match" in recorded and b"\x89PNG" in recorded
    # An answer about each of the six pages.
    assert b"validation/answer_5" in recorded and b"validation/answer_6" not in recorded
    assert "step 2 validation | exact match 0." in capsys.readouterr().out


def test_missing_documents_are_reported_before_training(experiment):
    elsewhere = dataclasses.replace(experiment.evaluation, dataset="nothing")
    with pytest.raises(UserError, match="nothing"):
        during_training(dataclasses.replace(experiment, evaluation=elsewhere))
