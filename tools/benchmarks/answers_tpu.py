"""Counts the FLOPs per question of answering, in programs compiled for a TPU, on a machine without TPUs.

    pip install "alignvlm-jax[tpu]"          installs libtpu
    tools/benchmark.py answers-tpu           the 1B model on one v5e chip

Each case is a number of questions about each of a few pages, which the generator's own planner puts into one batch. All
programs of the batch are compiled with the shapes that it pads to, and their matrix products are counted as by
`alignvlm compile` (docs/tpu.md): a loop counts as often as it runs, and padding counts too. The decoding loop runs for
the largest length of an answer. "alone" is a question whose prompt is its own page, in a batch of one.

A page is as large as the config allows. The rest of the prompt has the lengths of Llama 3's chat template.
"""

import argparse
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import generate, pages
from alignvlm_jax.inference.prompts import Prompt, pad_prompts
from alignvlm_jax.inference.vocabulary import cache_vocabulary
from alignvlm_jax.interop.start import load_config
from alignvlm_jax.locations import as_path
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, parameter_shapes, tokens_per_tile
from alignvlm_jax.parallel import hlo_work
from alignvlm_jax.parallel.hlo import Program
from alignvlm_jax.parallel.topology import topology_devices
from alignvlm_jax.training.ahead_of_time import resolve

CONFIG, TOPOLOGY = "configs/alignvlm_1b.py", "v5e:2x2"
CASES = {"1": (1,), "3.5": (4, 3), "16": (16,)}
"""Name of a case -> questions about each of its pages."""
HEAD_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 30, 25, 32
END_ID, PAD_ID = 1, 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--config", type=as_path, default=CONFIG, help=f"config of the model (default: {CONFIG})")
    parser.add_argument("--topology", default=TOPOLOGY, help=f"TPU slice (default: {TOPOLOGY})")
    parser.add_argument("--answer-tokens", type=int, default=ANSWER_TOKENS, help="tokens of an answer (default: 32)")


def run(args: argparse.Namespace) -> dict | None:
    """Compiles all programs; returns None if libtpu is missing."""
    experiment = load_config(args.config)
    try:
        device = topology_devices(args.topology)[0]
    except UserError as error:
        print(f"answers-tpu: skipped, {error}")
        return None
    model = resolve(experiment.model, device)
    tiles = experiment.data.tiling.max_tiles_per_image
    counter = Counter(model, device, args.answer_tokens)
    figures = {"jax": jax.__version__, "config": str(args.config), "topology": args.topology, "tiles": tiles}
    figures |= {"visual_tokens": tiles * tokens_per_tile(model), "answer_tokens": args.answer_tokens}
    prompts = make_prompts(model, tiles, (1,))
    (alone,) = pages.plan_batches(prompts, [pages.Group((0,), len(prompts[0].tokens))], batch_size=1)
    parts = counter.count(prompts, alone)
    figures["alone"] = report("alone", parts, 1, sum(parts.values()))
    for name, questions in CASES.items():
        prompts = make_prompts(model, tiles, questions)
        size = len(questions) * max(questions)
        (batch,) = pages.plan_batches(prompts, pages.group_prompts(prompts), batch_size=size)
        figures[name] = report(name, counter.count(prompts, batch), sum(questions), figures["alone"]["per_question"])
    return figures


def report(name: str, parts: dict[str, float], num_questions: int, alone: float) -> dict:
    """Prints and returns the FLOPs of the parts of a batch, and of each question next to those of a question alone."""
    per_question = sum(parts.values()) / num_questions
    shares = ", ".join(f"{part} {flops / 1e12:.3f}" for part, flops in parts.items())
    print(
        f"{name:>6} questions per page: {per_question / 1e12:7.3f} TFLOP per question, {alone / per_question:5.2f} "
        f"times less than alone (TFLOP of the batch: {shares})",
        flush=True,
    )
    return {"parts": parts, "per_question": per_question, "times_less": alone / per_question}


def make_prompts(model: AlignVLMConfig, num_tiles: int, questions: tuple[int, ...]) -> list[Prompt]:
    """Returns prompts of the benchmark's lengths, with a number of questions about each of several pages."""
    visual, side = num_tiles * tokens_per_tile(model), model.vision.image_size
    prompts = []
    for page, number in enumerate(questions):
        tiles = np.zeros((num_tiles, side, side, 3), np.uint8)
        tiles[0, 0, 0] = page
        valid_hw = np.full((num_tiles, 2), side, np.int32)
        for question in range(number):
            head, own = np.full(HEAD_TOKENS + visual, 2), np.full(QUESTION_TOKENS, 3 + question)
            index = np.full(HEAD_TOKENS + visual + QUESTION_TOKENS, -1)
            index[HEAD_TOKENS : HEAD_TOKENS + visual] = np.arange(visual)
            prompts.append(
                Prompt(np.concatenate([head, own]).astype(np.int32), index.astype(np.int32), tiles, valid_hw)
            )
    return prompts


class Counter:
    """Compiles the programs of batches and counts their FLOPs."""

    def __init__(self, model: AlignVLMConfig, device: jax.Device, answer_tokens: int):
        self._sharding = jax.sharding.SingleDeviceSharding(device)
        self._side, self._answer_tokens = model.vision.image_size, answer_tokens
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), nn.unbox(parameter_shapes(model))
        )
        self._model = AlignVLM(model)
        self._variables = self._place(jax.eval_shape(lambda params: cache_vocabulary(model, params), params))

    def count(self, prompts: list[Prompt], batch: pages.PageBatch) -> dict[str, float]:
        """Returns the FLOPs of each part of answering a batch."""
        options = generate.DecodingOptions(self._answer_tokens, (END_ID,), PAD_ID)
        if not batch.num_branches:
            rows = pad_prompts(prompts, rows=batch.num_pages, tile_size=self._side, pad_id=PAD_ID)
            program = generate.greedy_decode.lower(self._model, self._variables, self._place(rows), None, options)
            return _with_loop_apart("page", self._program(program), self._answer_tokens)
        page_rows = self._place(pages.pad_pages(prompts, batch, tile_size=self._side, pad_id=PAD_ID))
        page_program = generate.read_pages.lower(self._model, self._variables, page_rows, None)
        cache = self._place(
            jax.eval_shape(
                lambda variables, rows: generate.read_pages(self._model, variables, rows, None),
                self._variables,
                page_rows,
            )
        )
        (round_of_branches,) = batch.rounds()
        rows = self._place(pages.pad_branches(prompts, batch, round_of_branches, pad_id=PAD_ID))
        branch_program = generate.decode_branches.lower(self._model, self._variables, cache, rows, None, options)
        page = hlo_work.flops(Program(self._program(page_program)))
        return {"page": sum(page.values())} | _with_loop_apart(
            "branches", self._program(branch_program), self._answer_tokens
        )

    def _place(self, tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharding), tree)

    def _program(self, lowered: jax.stages.Lowered) -> str:
        start = time.monotonic()
        text = lowered.compile().as_text()
        print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
        return text


def _with_loop_apart(name: str, text: str, steps: int) -> dict[str, float]:
    """Returns the FLOPs before the decoding loop, under a name, and those of its steps.

    The loop is the only one whose number of iterations is not part of the program.
    """

    def total(trips: float) -> float:
        return sum(hlo_work.flops(Program(text, trips=lambda op_name: trips)).values())

    return {name: total(0.0), "decoding": total(steps) - total(0.0)}
