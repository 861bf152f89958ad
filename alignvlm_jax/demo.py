"""`alignvlm demo`: from nothing to a scored model, in one command that can be interrupted and goes on.

    OUT/data/            the corpus
    OUT/checkpoint/      the workdir of the training run: what `ask` and `eval` want as --checkpoint
    OUT/evaluation/      every answer of every evaluation, one JSON line each
    OUT/example.png      a held-out page (example_large.png: the same for human eyes)
    OUT/results.json     the figures

Each step leaves its result in a file, and is skipped when that is there and was made under the same config.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Callable, Mapping

import jax
import PIL.Image

import alignvlm_jax
from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.checkpoints.workdir import Progress
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_to_dict
from alignvlm_jax.data import images, store
from alignvlm_jax.data.synthetic import HELD_OUT_FONT
from alignvlm_jax.data.synthetic.corpus import build_corpus
from alignvlm_jax.evaluation import runner
from alignvlm_jax.evaluation.during_training import during_training
from alignvlm_jax.evaluation.report import Answer, Report, format_table
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.inspector.words import patch_words
from alignvlm_jax.models.connectors import AlignConfig
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training import loop
from alignvlm_jax.training.initial import initial_parameters, load_tokenizer

# The name under which a config's mixtures speak of the demo's corpus.
CORPUS = "documents"

# Pages a split. With three or four questions each, about a thousand held-out questions.
_SIZES = {"train": 24_000, "validation": 300, "heldout": 300}

# Not the experiment's: runs of different seeds are to be compared on the same documents.
_CORPUS_SEED = 0
_ENLARGED = 5
_COLUMN = 4  # characters shown of the word that a patch became


def run(config: ExperimentConfig, out: pathlib.Path, *, sizes: Mapping[str, int] = _SIZES) -> None:
    """Runs the demo, or what is left of it.

    Args:
      config: the experiment; its data root is replaced by a folder in `out`.
      out: where everything goes.
      sizes: pages to draw for each split.
    """
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(out / "data")))
    folder = out / "data" / CORPUS
    workdir = out / "checkpoint"
    out.mkdir(parents=True, exist_ok=True)

    _say(f"AlignVLM demo, into {out}. On two CPU cores: a minute to draw the documents, ten to train, a few to score.")
    _say("Interrupt it whenever you like: the same command goes on where it stopped.")

    _heading(1, "documents")
    build_corpus(folder, seed=_CORPUS_SEED, sizes=sizes)
    heldout = store.open_dataset(folder, "heldout")
    _say(", ".join(f"{size:,} {split}" for split, size in sizes.items()) + f" pages in {folder}")

    _heading(2, "before training: shipped backbones, fresh connector")
    key = _hash(config_to_dict(config), store.read_metadata(folder))
    score = functools.partial(_score_once, out=out / "evaluation", records=heldout)
    before = score("before", lambda: _untrained_reader(config), key=key)

    _heading(3, "training")
    progress = _train(config, workdir)

    _heading(4, "held-out documents: values, and one font, that training never saw")
    trained = functools.cache(lambda: alignvlm_jax.load(workdir))
    key = _hash(key, dataclasses.asdict(progress))
    reports = {
        "held-out": score("heldout", trained, key=key),
        "before training": before,
        "blank page": score("blank", trained, key=key, control="blank"),
        "another page": score("wrong", trained, key=key, control="wrong"),
    }
    _say("Share of questions answered exactly right, with 95 % intervals:\n")
    _say(format_table(reports))

    _heading(5, "an example")
    question = _show_example(trained(), heldout[0], reports["held-out"], out)

    runner.write_json(_results(config, reports, progress.train_seconds), out / "results.json")
    _heading(6, "what now")
    _say(f"checkpoint  {workdir}")
    _say(f"figures     {out / 'results.json'}")
    _say(f"answers     {out / 'evaluation'}")
    _say("\nAsk it something else, score it again, look at the curves, train another:\n")
    asked = f'--checkpoint {workdir} {out / "example.png"} --question "{question}"'
    _say(f"  alignvlm ask {asked}")
    if isinstance(config.model.connector, AlignConfig):
        _say(f"  alignvlm inspect {asked} --out {out / 'example.html'}")
    _say(f"  alignvlm eval --checkpoint {workdir} --split validation")
    _say(f"  tensorboard --logdir {workdir}   # after: pip install tensorboard")
    _say(f"  alignvlm demo --out {out.with_name(out.name + '-mlp')} --config.model.connector=mlp")


def draw_missing_corpus(config: ExperimentConfig) -> None:
    """Draws the demo's documents where a config names them and they are not there, so that `train` needs no demo."""
    folder = pathlib.Path(config.data.root) / CORPUS
    named = {part.dataset for stage in config.stages for part in stage.mixture}
    if CORPUS in named and not folder.exists():
        _say(f"{folder} is not there: drawing the demo's documents")
        build_corpus(folder, seed=_CORPUS_SEED, sizes=_SIZES)


def _untrained_reader(config: ExperimentConfig) -> Reader:
    """The backbones joined by a fresh connector: what stage 1 starts from."""
    params = initial_parameters(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    return Reader(config.model, params, load_tokenizer(config), config.data.tiling)


def _train(config: ExperimentConfig, workdir: pathlib.Path) -> Progress:
    """Trains what is left to train; the progress knows the seconds of all sittings."""
    loop.train(config, workdir, score=during_training(config))
    # Read back, not taken from the result: what is on disk names the run when the demo is called again.
    with Checkpointer(workdir, config) as checkpointer:
        progress = checkpointer.latest()
    _say(f"trained {progress.step} steps in {progress.train_seconds:.0f} s")
    return progress


def _score_once(
    name: str,
    make_reader: Callable[[], Reader],
    *,
    key: str,
    records: store.RecordSource,
    out: pathlib.Path,
    control: runner.Control = "none",
) -> Report:
    """Evaluates, or reads what an evaluation under the same `key` left behind."""
    figures, answers = out / f"{name}.json", out / f"{name}.jsonl"
    if figures.is_file() and (past := json.loads(figures.read_text()))["key"] == key:
        report = Report(_read_answers(answers), (HELD_OUT_FONT,), control, past["seconds"])
    else:
        report = runner.evaluate(
            make_reader(), records, control=control, unseen_fonts=(HELD_OUT_FONT,), title=f"scoring, {name}"
        )
        runner.write_predictions(report, answers)
        # Written last: without it the answers do not count as complete.
        runner.write_json({"key": key, **report.to_json()}, figures)
    _say(f"{name}: {report.overall.right} of {report.overall.total} right")
    return report


def _read_answers(file: pathlib.Path) -> list[Answer]:
    names = {field.name for field in dataclasses.fields(Answer)}
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [Answer(**{name: value for name, value in line.items() if name in names}) for line in lines]


def _show_example(reader: Reader, record: runner.Record, report: Report, out: pathlib.Path) -> str:
    """Saves the page, prints what was asked about it and answered; returns one of the questions."""
    image = images.open_image(record["image"])
    image.save(out / "example.png")
    enlarged = (image.width * _ENLARGED, image.height * _ENLARGED)
    image.resize(enlarged, PIL.Image.Resampling.BICUBIC).save(out / "example_large.png")
    _say(f"{record['id']}, a {record['source']}: {out / 'example.png'}, enlarged in {out / 'example_large.png'}\n")
    answers = [answer for answer in report.answers if answer.document == record["id"]]
    for answer in answers:
        verdict = "right" if answer.is_right else f"wrong: the page says {answer.expected}"
        _say(f"  {answer.question}  ->  {answer.predicted}   ({verdict})")
    if isinstance(reader.config.connector, AlignConfig):
        _say("\nThe likeliest word of each patch, as ALIGN tells the language model (· for none):\n")
        for tile in _patch_words(reader, image):
            for row in tile:
                if any(row):
                    cells = [f"{word[: _COLUMN - 1] or '·':<{_COLUMN}}" for word in row]
                    _say("  " + "".join(cells).rstrip())
    return answers[0].question


def _patch_words(reader: Reader, image: PIL.Image.Image) -> list[list[list[str]]]:
    """For each tile, row and column of patches, the word with the largest probability in ALIGN's distribution."""
    prompt = reader.prompts(image, ["?"])[0]
    variables = reader.generator.variables
    words = patch_words(reader.config, variables, prompt.tiles, prompt.tile_valid_hw, k=1, progress=False)
    side = reader.config.vision.grid_size
    grids = words.ids.reshape(-1, side, side)
    return [[[reader.tokenizer.decode([token]).strip() for token in row] for row in grid] for grid in grids]


def _results(config: ExperimentConfig, reports: dict[str, Report], seconds: float) -> dict:
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


def _hash(*values) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _heading(number: int, text: str) -> None:
    _say(f"\n== {number}. {text}")


def _say(text: str) -> None:
    print(text, flush=True)
