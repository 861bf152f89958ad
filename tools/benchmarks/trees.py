"""Measures training on pages with four questions each, as trees and with each question alone, in answers per second.

The data set is drawn like the demo's pages and has one question per record, as DocVQA has. Both sides train all parts
of the model in float32 with AdamW, from the same weights, and take turns. The median over the rounds counts. Batches
are packed before, by the pipeline of training. Both sides have as many tiles in a bin and as many bins in a step. The
positions of a bin are as many as come with these tiles on average, so the bins of both sides are about equally full.

The ceiling of the trees' speed follows from the FLOPs that the model needs (`training/flops.py`) if an operation takes
as long as with each question alone:

    seconds per FLOP     s = seconds of a step alone / FLOPs of a step alone
    ceiling, answers/s   answers of a step of trees / (s * FLOPs of a step of trees)

FLOPs of padding are not counted, so bins that are less full than those of the other side lower the share of the
ceiling.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alignvlm_jax.config import load_config
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.stages import LearningRates, MixturePart, StageConfig
from alignvlm_jax.data import pipeline
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.examples import ExampleReader
from alignvlm_jax.data.feeding import Feed
from alignvlm_jax.data.packing import Batch, PackingConfig, fill_fractions
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.data.synthetic.document import draw_document
from alignvlm_jax.data.synthetic.records import to_record
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.models.alignvlm import PARTS, AlignVLMConfig, Params, token_grid
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training import metrics, train_step
from alignvlm_jax.training.initial import load_tokenizer

from . import train

BAR = 0.85  # required share of the ceiling
QUESTIONS = 4
TILES_PER_BIN = 8  # four pages of two tiles
ROWS = {"nano": 4, "smollm2": 1, "quick": 1}
_PAGES, _BATCHES = 96, 4
_MAX_TEXT = 256


@dataclasses.dataclass
class _Side:
    """One way to train.

    Attributes:
      packing: shapes of its bins.
      batches: batches of a few steps, which repeat.
      train_on: trains on a batch and returns its metrics.
      step_flops: returns the FLOPs that a step with these metrics needs.
    """

    packing: PackingConfig
    batches: Sequence[Batch]
    train_on: Callable[[Batch], train_step.Metrics]
    step_flops: Callable[[train_step.Metrics], float]

    @property
    def answers(self) -> int:
        """Answers of all batches together."""
        return int(sum(batch["num_examples"].sum() for batch in self.batches))

    @property
    def fill(self) -> dict[str, float]:
        """Shares of the token slots and tile slots that are in use."""
        fills = [fill_fractions(batch) for batch in self.batches]
        return {name: statistics.mean(fill[name] for fill in fills) for name in fills[0]}

    def count_flops(self) -> float:
        """Trains on all batches and returns the FLOPs that the model needs for them."""
        return sum(self.step_flops(self.train_on(batch)) for batch in self.batches)

    def turn(self) -> float:
        """Trains on all batches and returns the seconds."""
        start = time.perf_counter()
        for batch in self.batches:
            self.train_on(batch)
        return time.perf_counter() - start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    models = train.MODELS
    parser.add_argument("--models", nargs="+", choices=models, default=list(models), help="models (default: both)")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds; their median counts (default: 5)")
    parser.add_argument("--quick", action="store_true", help="smoke test: nano with one layer, one round")


def run(args: argparse.Namespace) -> dict:
    """Measures, and prints a line for each model."""
    jax.config.update("jax_platforms", "cpu")
    figures = {"questions_per_page": QUESTIONS, "bar": BAR, "jax": jax.__version__}
    for name in ["quick"] if args.quick else args.models:
        figures[name] = _compare(name, 1 if args.quick else args.rounds, is_quick=args.quick)
    return figures


def make_records(number: int) -> list[dict]:
    """Returns prepared records of pages with four questions: one record per question, in random order."""
    records, index = [], 0
    while len(records) < number * QUESTIONS:
        document = draw_document(0, "train", index, render=False)
        if len(document.questions) == QUESTIONS:
            page = to_record(draw_document(0, "train", index))
            for i, (question, answer) in enumerate(zip(page["questions"], page["answers"], strict=True)):
                content = [{"type": "image"}, {"type": "text", "text": question}]
                messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
                record = {"id": f"{page['id']}-{i}", "conversation": json.dumps(messages), "images": [page["image"]]}
                records.append(record)
        index += 1
    return [records[i] for i in np.random.default_rng(0).permutation(len(records))]


def _compare(name: str, rounds: int, *, is_quick: bool) -> dict:
    """Times both sides in turns on one model, prints a line, and returns the figures."""
    experiment = load_config(train.CONFIG)
    model = train.model_config(name)
    records = make_records(8 if is_quick else _PAGES)
    params = train.start_parameters(model)
    sides = {
        "alone": _make_side(name, experiment, model, records, params, "off"),
        "tree": _make_side(name, experiment, model, records, params, "tree"),
    }
    del params
    # The first turn compiles and counts, the others are timed.
    needed = {side: sides[side].count_flops() for side in sides}
    seconds = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            seconds[side].append(sides[side].turn())
    rates = {side: sides[side].answers / statistics.median(seconds[side]) for side in sides}
    flops = {side: needed[side] / sides[side].answers for side in sides}
    # In each round, the ceiling is that of the time that the other side took.
    shares = [
        (needed["tree"] / tree) / (needed["alone"] / alone)
        for alone, tree in zip(seconds["alone"], seconds["tree"], strict=True)
    ]
    figures = {
        "bins": {side: dataclasses.asdict(sides[side].packing) for side in sides},
        "fill": {side: sides[side].fill for side in sides},
        "answers": {side: sides[side].answers for side in sides},
        "seconds": seconds,
        "flops_per_answer": flops,
        "answers_per_second": rates,
        "ceiling": rates["alone"] * flops["alone"] / flops["tree"],
        "share_of_ceiling": statistics.median(shares),
    }
    for side in sides:
        fill, packing = sides[side].fill, sides[side].packing
        print(
            f"{name}, {side}: {rates[side]:,.2f} answers/s, {flops[side] / 1e9:,.2f} GFLOP an answer; bins of "
            f"{packing.tokens_per_bin} tokens {fill['tokens']:.1%} full, of {packing.tiles_per_bin} tiles "
            f"{fill['tiles']:.1%}"
        )
    share = figures["share_of_ceiling"]
    print(
        f"{name}: {rates['tree'] / rates['alone']:.2f} times as many answers/s as alone, by FLOPs "
        f"{flops['alone'] / flops['tree']:.2f} times: {share:.1%} of the ceiling ({min(shares):.1%} to "
        f"{max(shares):.1%}); target {BAR:.0%}: {'met' if share >= BAR else 'missed'}"
    )
    return figures


def _make_side(
    name: str, experiment: ExperimentConfig, model: AlignVLMConfig, records: list[dict], params: Params, grouping: str
) -> _Side:
    """Packs the batches of a side and jits its step."""
    read = functools.partial(_make_reader, records, load_tokenizer(experiment), model, experiment.data.tiling, grouping)
    tokens_per_bin = _mean_tokens_per_bin(read(2**14, ROWS[name]))
    reader = read(tokens_per_bin, ROWS[name])
    batches = _make_batches(reader, ROWS[name], 1 if name == "quick" else _BATCHES)
    rates = LearningRates(train.RATE, train.RATE, train.RATE)
    stage = StageConfig(
        "all", (), PARTS, steps=10**6, learning_rates=rates, schedule="constant", optimizer=train.OPTIMIZER
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    fields = train_step.batch_fields(model, grouping == "tree")
    branch_tokens = reader.packing.branch_tokens if grouping == "tree" else None
    with jax.set_mesh(mesh):
        step = train_step.jit_train_step(model, stage, mesh, branch_tokens=branch_tokens)
        # The step donates its state, and both sides start from the same weights.
        state = train_step.place_state(model, stage, mesh, jax.tree.map(jnp.copy, params))

    def train_on(batch: Batch) -> train_step.Metrics:
        nonlocal state
        with jax.set_mesh(mesh):
            state, measured = step(state, sharding.shard_batch({name: batch[name] for name in fields}, mesh))
            return jax.device_get(measured)

    return _Side(reader.packing, batches, train_on, metrics.step_flops(model, stage))


def _make_batches(reader: ExampleReader, rows: int, number: int) -> list[Batch]:
    """Returns the first batches of one microbatch."""
    feed = Feed(reader, range(rows), 1)
    try:
        return list(itertools.islice(feed, number))
    finally:
        feed.close()


def _make_reader(
    records: list[dict],
    chat: ChatTokenizer,
    model: AlignVLMConfig,
    tiling: TilingConfig,
    grouping: str,
    tokens_per_bin: int,
    rows: int,
) -> ExampleReader:
    """Returns the reader of the records' examples."""
    part = MixturePart("pages")
    packing = PackingConfig(
        tokens_per_bin,
        TILES_PER_BIN,
        rows,
        examples_per_bin=TILES_PER_BIN * QUESTIONS,
        branch_tokens_per_bin=tokens_per_bin,
    )
    data = DataConfig(tiling=tiling, packing=packing, group_questions=grouping)
    return pipeline.make_reader(
        {pipeline.source_name(part): records},
        (part,),
        chat,
        data,
        seed=(0,),
        token_grid=token_grid(model),
        max_text_tokens=_MAX_TEXT,
    )


def _mean_tokens_per_bin(reader: ExampleReader) -> int:
    """Returns the tokens that come with the tiles of a bin on average, rounded up."""
    measured = [example for position in range(reader.num_groups) for example in reader.measure(position)]
    tokens = sum(example.tokens for example in measured) / sum(example.tiles for example in measured)
    return 16 * math.ceil(1.02 * TILES_PER_BIN * tokens / 16)
