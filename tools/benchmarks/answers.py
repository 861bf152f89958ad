"""Measures how fast questions are answered when those about one page share it, compared with every prompt alone.

    tools/benchmark.py answers --json answers.json

The pages are held-out pages of the demo, the model is the trained nano model. Two cases:

    own   the three or four questions of each page, as in `alignvlm eval`
    16    sixteen questions about each page: its own, then those of other pages of its family

Both contenders answer the same prompts with the same weights, batch size and limits. "alone" makes every prompt a page
of its own, which encodes the page again for each question. They take turns, and the median of several rounds counts.
Cutting the pages into tiles is the same for both, happens once per page, and is printed apart.

The shares come from a round of its own, in which every program is waited for, and from one that ends after one token:

    page      encoder, connector, and the decoder over the page; alone: over the whole prompt
    branch    the decoder over each question's own tokens
    decoding  the answers, token by token
    rest      planning, padding and copying on the host
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np

from alignvlm_jax.data.synthetic import Document, draw_document
from alignvlm_jax.inference import generate
from alignvlm_jax.inference.prompts import Prompt
from alignvlm_jax.inference.reader import Reader, load
from alignvlm_jax.locations import location

CONTENDERS = {"alone": False, "shared": True}
_MANY = 16
_PROFILES = 2  # Rounds of which the faster one gives the shares.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--checkpoint", type=location, default="nano", help='as for `alignvlm eval` (default: "nano")')
    parser.add_argument("--pages", type=int, default=64, help="number of held-out pages (default: 64)")
    parser.add_argument("--batch-size", type=int, default=32, help="questions decoded at once (default: 32)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="maximum length of an answer (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, help="number of timed rounds; the median counts (default: 5)")
    parser.add_argument("--quick", action="store_true", help="smoke test: one layer, one page, one token, one round")


def run(args: argparse.Namespace) -> dict:
    """Measures both cases, and prints a line for each contender."""
    pages, rounds, tokens = (1, 1, 1) if args.quick else (args.pages, args.rounds, args.max_new_tokens)
    reader = load(args.checkpoint, batch_size=args.batch_size)
    if args.quick:
        reader = small_reader(reader)
    documents = [draw_document(0, "heldout", index) for index in range(pages)]
    figures = {"machine": platform.machine(), "jax": jax.__version__, "pages": pages, "batch_size": args.batch_size}
    cases = {"own": [document.questions for document in documents]}
    if not args.quick:
        cases[str(_MANY)] = [many_questions(document, documents, _MANY) for document in documents]
    for name, questions in cases.items():
        start = time.perf_counter()
        prompts = [
            prompt
            for document, asked in zip(documents, questions, strict=True)
            for prompt in reader.prompts(document.image, asked)
        ]
        seconds = time.perf_counter() - start
        print(f"{name}: {len(prompts)} questions about {pages} pages, whose tiles and tokens took {seconds:.2f} s")
        figures[name] = {"questions": len(prompts), "prompt_seconds": seconds} | compare(
            reader, prompts, tokens, rounds
        )
    return figures


def small_reader(reader: Reader) -> Reader:
    """Returns a reader with the first layer of each part alone, which compiles in less time."""
    parts = {name: getattr(reader.config, name) for name in ("vision", "language")}
    parts = {name: dataclasses.replace(part, num_layers=1) for name, part in parts.items()}
    params = dict(reader.generator.variables["params"])
    for name in parts:
        first = jax.tree.map(lambda leaf: leaf[:1], params[name]["layers"])
        params[name] = {**params[name], "layers": first}
    config = dataclasses.replace(reader.config, **parts)
    return Reader(config, params, reader.tokenizer, reader.tiling, batch_size=4)


def many_questions(document: Document, documents: Sequence[Document], number: int) -> list[str]:
    """Returns a number of questions about a page: its own, then those of other pages of its family, again and again."""
    others = [other.questions for other in documents if other.family == document.family and other is not document]
    distinct = list(dict.fromkeys(itertools.chain(document.questions, *others)))
    return list(itertools.islice(itertools.cycle(distinct), number))


def compare(reader: Reader, prompts: Sequence[Prompt], max_new_tokens: int, rounds: int) -> dict:
    """Times both contenders in turns, and prints questions per second, their ratio, and the shares of the parts."""

    def answer(name: str) -> list[np.ndarray]:
        return reader.generator.generate(prompts, max_new_tokens, share_pages=CONTENDERS[name])

    answers = {name: answer(name) for name in CONTENDERS}  # also compiles
    different = sum(not np.array_equal(*pair) for pair in zip(*answers.values(), strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, times in seconds.items():
            start = time.perf_counter()
            answer(name)
            times.append(time.perf_counter() - start)
    figures: dict = {"different_answers": different, "load": os.getloadavg()[0]}
    for name, times in seconds.items():
        rate = len(prompts) / statistics.median(times)
        figures[name] = {"questions_per_second": rate, "seconds": times}
        figures[name]["shares"] = shares(reader, prompts, max_new_tokens, is_shared=CONTENDERS[name])
        parts = ", ".join(f"{part} {share:.0%}" for part, share in figures[name]["shares"].items())
        print(f"  {name:7}{rate:8.1f} questions/s ({parts})", flush=True)
    alone, shared = (statistics.median(times) for times in seconds.values())
    figures["ratio"] = alone / shared
    print(
        f"  shared pages: {figures['ratio']:.2f} times the questions/s; {different} of {len(prompts)} answers differ;"
        f" load {figures['load']:.1f}",
        flush=True,
    )
    return figures


def shares(reader: Reader, prompts: Sequence[Prompt], max_new_tokens: int, *, is_shared: bool) -> dict[str, float]:
    """Returns the share of each part in the time of one round."""

    def measure(limit: int) -> tuple[Stopwatch, float]:
        reader.generator.generate(prompts, limit, share_pages=is_shared)  # compiles
        return min((measure_once(limit) for _ in range(_PROFILES)), key=lambda measured: measured[1])

    def measure_once(limit: int) -> tuple[Stopwatch, float]:
        with stopwatch(reader.generator.pad_id) as watch:
            start = time.perf_counter()
            reader.generator.generate(prompts, limit, share_pages=is_shared)
            return watch, time.perf_counter() - start

    # With a limit of one token, the decoding loop of the same programs runs for a single step.
    complete, total = measure(max_new_tokens)
    one_step, _ = measure(1)
    decoding, before = 0.0, {}
    for name in ("greedy_decode", "decode_branches"):
        more_steps = max(1, complete.steps[name] - one_step.steps[name])
        of_loop = (complete.seconds[name] - one_step.seconds[name]) * complete.steps[name] / more_steps
        of_loop = max(0.0, of_loop)  # Two times that are nearly equal may come in any order.
        decoding, before[name] = decoding + of_loop, complete.seconds[name] - of_loop
    parts = {
        "page": complete.seconds["read_pages"] + before["greedy_decode"],
        "branch": before["decode_branches"],
        "decoding": decoding,
        "rest": total - sum(complete.seconds.values()),
    }
    return {part: value / total for part, value in parts.items()}


class Stopwatch(NamedTuple):
    """Seconds of the generator's programs, and steps of their decoding loops, by the name of the program."""

    seconds: dict[str, float]
    steps: dict[str, int]


@contextlib.contextmanager
def stopwatch(pad_id: int) -> Iterator[Stopwatch]:
    """Waits for each of the generator's programs, and adds its time and its steps to the stopwatch."""
    watch = Stopwatch(collections.defaultdict(float), collections.defaultdict(int))

    def timed(name: str) -> Callable:
        program = getattr(generate, name)

        def call(*args, **options):
            start = time.perf_counter()
            result = jax.block_until_ready(program(*args, **options))
            watch.seconds[name] += time.perf_counter() - start
            if name != "read_pages":
                # After the last step, answers have only padding.
                watch.steps[name] += int(np.any(np.asarray(result) != pad_id, axis=0).sum())
            return result

        return call

    with contextlib.ExitStack() as stack:
        for name in ("read_pages", "decode_branches", "greedy_decode"):
            stack.enter_context(mock.patch.object(generate, name, timed(name)))
        yield watch
