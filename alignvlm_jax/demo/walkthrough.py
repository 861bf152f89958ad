"""Runs the demo: from nothing to a scored model, in one command that can be interrupted and resumed.

    OUT/data/            the corpus
    OUT/checkpoint/      the workdir of the training run, for `ask` and `eval` as --checkpoint
    OUT/evaluation/      every answer of every evaluation, one JSON line each
    OUT/example.png      a held-out page (example_large.png: the same page, enlarged)
    OUT/results.json     the scores, with config and versions

Each step writes its result to a file. It is skipped if the file exists and was written with the same config.
"""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Mapping

import jax

import alignvlm_jax
from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.checkpoints.workdir import Progress
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_to_dict
from alignvlm_jax.data import store
from alignvlm_jax.demo.corpus import CORPUS, SIZES, draw_corpus
from alignvlm_jax.demo.example import show_example
from alignvlm_jax.demo.output import show, show_heading
from alignvlm_jax.demo.scoring import make_key, score_once
from alignvlm_jax.evaluation import runner
from alignvlm_jax.evaluation.during_training import during_training
from alignvlm_jax.evaluation.report import Report, format_table
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.leases.one_writer import one_writer
from alignvlm_jax.models.connectors import AlignConfig
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training import loop
from alignvlm_jax.training.initial import initial_parameters, load_tokenizer


@ordinary_modes()
def run(config: ExperimentConfig, out: pathlib.Path, *, sizes: Mapping[str, int] = SIZES) -> None:
    """Runs the demo, or the rest of it.

    Args:
      config: the experiment; its data root is replaced by a folder in `out`.
      out: folder for everything that the demo writes.
      sizes: pages to draw for each split.

    Raises:
      InUseError: if another process is running the demo in `out`.
    """
    with one_writer(out):
        _run(config, out, sizes)


def _run(config: ExperimentConfig, out: pathlib.Path, sizes: Mapping[str, int]) -> None:
    """Runs the demo while this process holds the lease of `out`."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(out / "data")))
    folder = out / "data" / CORPUS
    workdir = out / "checkpoint"

    show(f"AlignVLM demo in {out}. On two CPU cores: a minute to draw the documents, ten to train, a few to score.")
    show("You can interrupt it at any time: run the same command again to resume.")

    show_heading(1, "documents")
    draw_corpus(folder, sizes)
    heldout = store.open_dataset(folder, "heldout")
    show(", ".join(f"{size:,} {split}" for split, size in sizes.items()) + f" pages in {folder}")

    show_heading(2, "before training: shipped backbones, fresh connector")
    # The key changes with the config and the corpus; scores with another key are computed again.
    key = make_key(config_to_dict(config), store.read_metadata(folder))
    score = functools.partial(score_once, out=out / "evaluation", records=heldout)
    before = score("before", lambda: _untrained_reader(config), key=key)

    show_heading(3, "training")
    progress = _train(config, workdir)

    show_heading(4, "held-out documents, with values and a font that training never used")
    # Load the trained model at most once, and only if a score is missing.
    trained = functools.cache(lambda: alignvlm_jax.load(workdir))
    key = make_key(key, dataclasses.asdict(progress))
    reports = {
        "held-out": score("heldout", trained, key=key),
        "before training": before,
        "blank page": score("blank", trained, key=key, control="blank"),
        "another page": score("wrong", trained, key=key, control="wrong"),
    }
    show("Share of questions answered exactly right, with 95 % intervals:\n")
    show(format_table(reports))

    show_heading(5, "an example")
    question = show_example(trained(), heldout[0], reports["held-out"], out)

    runner.write_json(_results(config, reports, progress.train_seconds), out / "results.json")
    _show_next_steps(config, out, workdir, question)


def _untrained_reader(config: ExperimentConfig) -> Reader:
    """Returns a reader of the initial weights of stage 1: the backbones and a freshly initialized connector."""
    params = initial_parameters(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    return Reader(config.model, params, load_tokenizer(config), config.data.tiling)


def _train(config: ExperimentConfig, workdir: pathlib.Path) -> Progress:
    """Trains, or resumes training. The returned progress includes the seconds of all sessions."""
    loop.train(config, workdir, score=during_training(config))
    # Read the progress from the checkpoint, so that a repeated demo gets the same value for the key of the scores.
    with Checkpointer(workdir, config) as checkpointer:
        progress = checkpointer.latest()
    show(f"trained {progress.step} steps in {progress.train_seconds:.0f} s")
    return progress


def _show_next_steps(config: ExperimentConfig, out: pathlib.Path, workdir: pathlib.Path, question: str) -> None:
    """Prints the folders of the results and commands to try next."""
    show_heading(6, "next steps")
    show(f"checkpoint  {workdir}")
    show(f"results     {out / 'results.json'}")
    show(f"answers     {out / 'evaluation'}")
    show("\nAsk another question, score it again, view the training curves, train another connector:\n")
    arguments = f'--checkpoint {workdir} {out / "example.png"} --question "{question}"'
    show(f"  alignvlm ask {arguments}")
    if isinstance(config.model.connector, AlignConfig):
        show(f"  alignvlm inspect {arguments} --out {out / 'example.html'}")
    show(f"  alignvlm eval --checkpoint {workdir} --split validation")
    show(f"  tensorboard --logdir {workdir}   # after: pip install tensorboard")
    show(f"  alignvlm demo --out {out.with_name(out.name + '-mlp')} --config.model.connector=mlp")


def _results(config: ExperimentConfig, reports: dict[str, Report], seconds: float) -> dict:
    """Returns the content of `results.json`."""
    heldout, before, blank, wrong = reports.values()
    score = {name: report.overall.to_json()["exact_match"] for name, report in reports.items()}
    return {
        "exact_match": score["held-out"],
        "before_exact_match": score["before training"],
        "blank_image_exact_match": score["blank page"],
        "wrong_image_exact_match": score["another page"],
        "train_seconds": round(seconds, 1),
        "per_family": {family: tally.to_json()["exact_match"] for family, tally in heldout.per_family.items()},
        "unseen_font_exact_match": heldout.unseen_font.to_json()["exact_match"],
        "num_questions": heldout.overall.total,
        "evaluations": {
            "heldout": heldout.to_json(),
            "before": before.to_json(),
            "blank": blank.to_json(),
            "wrong": wrong.to_json(),
        },
        "config": config_to_dict(config),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "grain")},
            "alignvlm_jax": alignvlm_jax.__version__,
        },
        "cpu_count": os.cpu_count(),
    }
