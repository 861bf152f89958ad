"""Measures training on this machine, in tokens per second, compared with eager PyTorch on the exported folder.

Both sides train all parts of the model in float32 with AdamW and clipped gradients, from the same weights, on the same
pages, and with the same number of threads. Ours packs the pages into bins, PyTorch pads each one to the longest. Only
the tokens of pages count, not padding.

Each side runs in a process of its own. The two take turns, so other load on the machine affects both, and the median
over the rounds counts. The exported folder holds the weights that ours starts from, so the first losses agree.

Threads that wait for each other suffer most from other load: PyTorch's more than ours. On a busy machine, only the
tokens per CPU second of one core mean something (`taskset -c 0 tools/benchmark.py train`).
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from alignvlm_jax.commands.huge_pages import SWITCH, huge_page_modes, with_huge_pages
from alignvlm_jax.config import load_config
from alignvlm_jax.config.optimizer import OptimizerConfig
from alignvlm_jax.config.stages import LearningRates, StageConfig
from alignvlm_jax.data.packing import Batch, Example, PackingConfig, empty_batch, write_bin
from alignvlm_jax.interop import export, published, tables
from alignvlm_jax.interop.pytorch import REMOTE_CODE_FILES, remote_code
from alignvlm_jax.interop.tensor_writer import write_parameters
from alignvlm_jax.models.alignvlm import PARTS, AlignVLMConfig, random_parameters, tokens_per_tile
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training import train_step

CONFIG = Path(__file__).parents[2] / "configs" / "nano.py"
BAR = 1.3  # required speed relative to PyTorch
MODELS = ("nano", "smollm2")
IMAGE_ID = 3
TILES_PER_PAGE = 2
PAGES_PER_BIN = 2
RATE = 1e-4
OPTIMIZER = OptimizerConfig(name="adamw", weight_decay=0.01, clip_norm=1.0)

_Turn = tuple[float, float, float]
"""Loss of the last step, seconds of all steps, and seconds of the processors."""

# The decoder of SmolLM2-135M. Its encoder is nano's.
SMOLLM2 = published.find("language", "smollm2-135m")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--peer", choices=("torch", "none"), default="torch", help="the other side (default: torch)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="models (default: both)")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds; their median counts (default: 5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a turn (default: 5)")
    parser.add_argument("--threads", type=int, default=_num_cores(), help="threads of PyTorch (default: all cores)")
    parser.add_argument(
        "--huge-pages",
        choices=("ours", "both", "none"),
        default="ours",
        help="sides with huge pages (default: ours, as the alignvlm command has them)",
    )
    parser.add_argument("--quick", action="store_true", help="smoke test: nano with one layer, one short round")


def run(args: argparse.Namespace) -> dict | None:
    """Measures, and prints a line for each model; returns None if PyTorch is needed and not installed."""
    jax.config.update("jax_platforms", "cpu")
    figures = {"machine": platform.machine(), "cores": _num_cores(), "jax": jax.__version__, "bar": BAR}
    sides = {"ours": train_ours}
    if args.peer == "torch":
        try:
            import torch
            import transformers
        except ImportError as error:
            print(f'{error}: PyTorch or transformers is missing: pip install -e ".[torch]"')
            return None
        figures |= {"torch": torch.__version__, "transformers": transformers.__version__}
        sides["torch"] = train_torch
    for name in ["quick"] if args.quick else args.models:
        figures[name] = _compare(name, sides, args)
    return figures


def _num_cores() -> int:
    """Returns the number of cores that this process may use; `taskset` limits it, also for JAX."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def model_config(name: str) -> AlignVLMConfig:
    """Returns the model of configs/nano.py: as it is, with the decoder of SmolLM2, or with one layer in each part."""
    nano = load_config(CONFIG).model
    if name == "smollm2":
        return dataclasses.replace(nano, language=SMOLLM2)
    if name == "quick":
        vision, language = (dataclasses.replace(part, num_layers=1) for part in (nano.vision, nano.language))
        return dataclasses.replace(nano, vision=vision, language=language)
    return nano


def make_pages(name: str, config: AlignVLMConfig) -> list[Example]:
    """Returns random pages as long as the demo's: two tiles, and 40 to 88 tokens of text, half of them an answer."""
    rng = np.random.default_rng(0)
    side, num_visual = config.vision.image_size, TILES_PER_PAGE * tokens_per_tile(config)
    pages = []
    for number in range(4 if name == "smollm2" else 8):
        num_text = int(rng.integers(40, 89))
        tokens = rng.integers(10, config.language.vocab_size, num_visual + num_text, dtype=np.int32)
        visual_index = np.full(len(tokens), -1, np.int32)
        visual_index[2 : 2 + num_visual] = np.arange(num_visual)
        tokens[visual_index >= 0] = IMAGE_ID
        weights = np.zeros(len(tokens), np.float32)
        weights[-num_text // 2 : -1] = 1.0
        tiles = rng.integers(0, 256, (TILES_PER_PAGE, side, side, 3), np.uint8)
        sizes = np.full((TILES_PER_PAGE, 2), side, np.int32)
        pages.append(Example((number,), tokens, weights, visual_index, tiles, sizes))
    return pages


def pack(config: AlignVLMConfig, pages: list[Example]) -> Batch:
    """Returns the pages as one microbatch of bins, two in each."""
    tokens_per_bin = PAGES_PER_BIN * (TILES_PER_PAGE * tokens_per_tile(config) + 88)
    packing = PackingConfig(tokens_per_bin, PAGES_PER_BIN * TILES_PER_PAGE, len(pages) // PAGES_PER_BIN, PAGES_PER_BIN)
    batch = empty_batch(
        1, packing.bins_per_microbatch, packing, tile_size=config.vision.image_size, pad_id=0, resampled=config.newline
    )
    for row in range(packing.bins_per_microbatch):
        members = pages[row * PAGES_PER_BIN : (row + 1) * PAGES_PER_BIN]
        write_bin(batch, (0, row), members, tokens_per_tile(config))
    return batch


def start_parameters(config: AlignVLMConfig) -> dict:
    """Returns the random weights that both sides start from."""
    return nn.unbox(jax.jit(lambda: random_parameters(config, jax.random.key(0)))())


def train_ours(config: AlignVLMConfig, pages: list[Example], folder: Path, threads: int) -> Callable[[], float]:
    """Returns a function that trains one step and returns its loss, by the program of `alignvlm train`."""
    del folder, threads
    rates = LearningRates(RATE, RATE, RATE)
    stage = StageConfig("all", (), PARTS, steps=10**6, learning_rates=rates, schedule="constant", optimizer=OPTIMIZER)
    mesh = make_mesh(MeshConfig())
    batch = {name: field for name, field in pack(config, pages).items() if name in train_step.batch_fields(config)}
    with jax.set_mesh(mesh):
        step = train_step.jit_train_step(config, stage, mesh)
        state = train_step.place_state(config, stage, mesh, start_parameters(config))

    def train() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step(state, sharding.shard_batch(batch, mesh))
            return float(metrics["loss"])

    return train


def train_torch(config: AlignVLMConfig, pages: list[Example], folder: Path, threads: int) -> Callable[[], float]:
    """Returns a function that trains one step and returns its loss, by eager PyTorch."""
    import torch
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(threads)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (OPTIMIZER.b1, OPTIMIZER.b2), OPTIMIZER.eps, 0.01)
    longest = max(len(page.tokens) for page in pages)

    def pad(arrays, value):
        rows = [np.pad(array, (0, longest - len(array)), constant_values=value) for array in arrays]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    tiles = np.concatenate([page.tiles for page in pages]).transpose(0, 3, 1, 2)
    # The label of a position is its own token, where the position before it has a weight.
    labels = [np.where(np.append(0, page.loss_weights[:-1]) > 0, page.tokens, -100) for page in pages]
    inputs = {
        "input_ids": pad([page.tokens for page in pages], 0),
        "attention_mask": pad([np.ones_like(page.tokens) for page in pages], 0),
        "labels": pad(labels, -100),
        "pixel_values": torch.from_numpy(tiles.astype(np.float32) / 127.5 - 1.0),
    }

    def train() -> float:
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        return loss.item()

    return train


def write_folder(config: AlignVLMConfig, folder: Path) -> None:
    """Writes what PyTorch reads of an exported folder: the code, the config and the weights."""
    params = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(start_parameters(config)).items()}
    for name in REMOTE_CODE_FILES:
        (folder / name).write_text(remote_code(name), encoding="utf-8")
    ids = {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 0}
    contents = export.alignvlm_config(config, dtype="float32", image_token_id=IMAGE_ID, special_ids=ids)
    (folder / "config.json").write_text(json.dumps(contents))
    write_parameters(
        folder,
        tables.alignvlm(config),
        shapes={path: leaf.shape for path, leaf in params.items()},
        dtypes={path: leaf.dtype for path, leaf in params.items()},
        read=lambda path, index: params[path][index],
    )


def _compare(name: str, sides: dict[str, Callable], args: argparse.Namespace) -> dict:
    """Times the sides in turns on one model, prints a line, and returns the figures."""
    config = model_config(name)
    pages = make_pages(name, config)
    num_tokens = sum(len(page.tokens) for page in pages)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if "torch" in sides:
            write_folder(config, Path(folder))
        arguments = config, pages, Path(folder), args.threads
        turns = {}
        for side, make in sides.items():
            environment = _environment(args.huge_pages in (side, "both"))
            turns[side] = stack.enter_context(_worker(make, arguments, environment))
        # The first step compiles, the second one warms up.
        losses, seconds = {}, {}
        for side, turn in turns.items():
            losses[side], first_step, _ = turn(1)
            seconds[side] = turn(1)[1]
            print(f"{name}, {side}: first loss {losses[side]:.5f} in {first_step:.1f} s")
        steps = {side: 1 if args.quick else max(1, round(args.seconds / seconds[side])) for side in sides}
        rates, cpu_rates = ({side: [] for side in sides} for _ in range(2))
        for _ in range(1 if args.quick else args.rounds):
            for side, turn in turns.items():
                _, wall, cpu = turn(steps[side])
                rates[side].append(num_tokens * steps[side] / wall)
                cpu_rates[side].append(num_tokens * steps[side] / cpu)
    figures = {
        "pages": len(pages),
        "tokens": num_tokens,
        "first_loss": losses,
        "tokens_per_second": {side: statistics.median(values) for side, values in rates.items()},
        "tokens_per_cpu_second": {side: statistics.median(values) for side, values in cpu_rates.items()},
        "rounds": rates,
    }
    line = ", ".join(f"{side} {rate:,.0f} tokens/s" for side, rate in figures["tokens_per_second"].items())
    if "torch" in sides:
        ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["torch"], strict=True)]
        figures["ratio"] = statistics.median(ratios)
        per_cpu = figures["tokens_per_cpu_second"]
        figures["cpu_ratio"] = per_cpu["ours"] / per_cpu["torch"]
        line += f", ratio {figures['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        line += f"; target {BAR}: {'met' if figures['ratio'] >= BAR else 'missed'}"
        line += f"; per CPU second {per_cpu['ours']:,.0f} and {per_cpu['torch']:,.0f}, ratio {figures['cpu_ratio']:.2f}"
    print(f"{name}, {len(pages)} pages of {num_tokens} tokens: {line}")
    return figures


def _environment(use_huge_pages: bool) -> dict[str, str]:
    """Returns the variables of a side's process; the command sets the same ones where huge pages help."""
    environment = {SWITCH: "", "GLIBC_TUNABLES": ""}
    restarted = with_huge_pages(environment, huge_page_modes()) if use_huge_pages else None
    return {**(restarted or environment), "JAX_PLATFORMS": "cpu"}


@contextlib.contextmanager
def _worker(make: Callable, arguments: tuple, environment: dict[str, str]) -> Iterator[Callable[[int], _Turn]]:
    """Starts a process; yields a function that trains some steps there."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
    # The C library and JAX read variables when a program starts.
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    process.start()
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value
    theirs.close()

    def turn(steps: int) -> _Turn:
        ours.send(steps)
        return ours.recv()

    try:
        yield turn
    finally:
        ours.close()
        process.join()


def _serve(connection, make: Callable, arguments: tuple) -> None:
    """Trains as many steps as it is asked for, again and again."""
    train = make(*arguments)
    with contextlib.suppress(EOFError):
        while True:
            steps, loss = connection.recv(), 0.0
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                loss = train()
            connection.send((loss, time.perf_counter() - start, time.process_time() - start_cpu))
