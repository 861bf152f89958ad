#!/usr/bin/env python3
"""Measures what matters on one GPU, the most valuable figures first, in at most ten minutes.

    python tools/gpu_check.py --json gpu.json             one GPU with 80 GB
    python tools/gpu_check.py --json cpu.json --tiny      any machine: tiny shapes, in a minute

It needs this folder, jax and flax, and runs with JAX 0.10 and 0.11. tokamax and torch are measured if they are
installed. The inputs are random. Each figure is printed and written as soon as it is known, so a run that is cut short
leaves the figures before. A part that fails leaves its error, and the next one follows.

    matmul      the rate of one bfloat16 product [T, D] x [D, V]: what the other rates are compared with
    align       ALIGN forward and backward at T = 8192, D = 4096, V = 131072; the dense form; the dense form in PyTorch,
                compiled. Their rates count the six products of the dense form
    attention   each kernel at 14,848 positions in two segments, forward and with gradients, and its distance from "xla"
    train_1b    the training step of the 1B model, all parts trained, one bin of two pages; model FLOPs utilization
    frozen_8b   the training step of the 8B model with a frozen encoder and decoder. Stands in for LoRA, which does not
                exist yet: the same products, without those of the adapters
    train_1b_kept    train_1b, keeping attention's output, queries, keys and values instead of recomputing them
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from benchmarks import jaxtyping_stand_in  # noqa: F401

from alignvlm_jax.config.stages import MixturePart, StageConfig
from alignvlm_jax.locations import as_path
from alignvlm_jax.models import hardware
from alignvlm_jax.models.alignvlm import AlignVLMConfig, random_parameters, tokens_per_tile
from alignvlm_jax.models.language import LanguageConfig, RopeScaling
from alignvlm_jax.models.vision import VisionConfig
from alignvlm_jax.ops import attention, attention_flash, attention_tokamax
from alignvlm_jax.ops.dense_align import dense_vocabulary_attention
from alignvlm_jax.ops.vocabulary_attention import vocabulary_attention
from alignvlm_jax.parallel.chips import find_chip
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training.flops import train_flops
from alignvlm_jax.training.train_step import FIELDS, create_state, jit_train_step, state_shardings

_DENSE_PRODUCTS = 6
"""Products of [T, D] and [D, V] in ALIGN's dense form: two forward, four backward."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the measured programs.

    Attributes:
      align: T, D and V of ALIGN.
      attention: positions, heads, key-value heads and width of a head.
      model_1b: the smaller model.
      model_8b: the larger one.
      tiles: tiles of each of the two pages of a bin.
      text: text tokens of each page; a quarter of them are answers.
      seconds: how long each program is repeated.
    """

    align: tuple[int, int, int]
    attention: tuple[int, int, int, int]
    model_1b: AlignVLMConfig
    model_8b: AlignVLMConfig
    tiles: int
    text: int
    seconds: float


_SIGLIP = VisionConfig(remat="full")
_LLAMA_1B = LanguageConfig(head_dim=64, rope_scaling=RopeScaling(), tie_word_embeddings=True, remat="full")
_LLAMA_8B = LanguageConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_scaling=RopeScaling(factor=8.0),
    tie_word_embeddings=False,
    remat="full",
)
REAL = Sizes(
    align=(8192, 4096, 131072),
    attention=(14848, 32, 8, 64),
    model_1b=AlignVLMConfig(vision=_SIGLIP, language=_LLAMA_1B),
    model_8b=AlignVLMConfig(vision=_SIGLIP, language=_LLAMA_8B),
    tiles=10,
    text=134,
    seconds=1.0,
)
_TINY_MODEL = AlignVLMConfig(
    vision=VisionConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2),
    language=LanguageConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, remat="full"
    ),
)
TINY = Sizes((32, 16, 64), (96, 4, 2, 8), _TINY_MODEL, _TINY_MODEL, tiles=2, text=8, seconds=0.01)


class Report:
    """Figures that are printed and written as they come."""

    def __init__(self, file: Path | None, minutes: float):
        self.figures: dict[str, dict] = {}
        self.file = file
        self.end = time.monotonic() + 60 * minutes

    def add(self, part: str, **figures) -> None:
        """Adds figures to a part."""
        figures = {
            name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in figures.items()
        }
        self.figures.setdefault(part, {}).update(figures)
        for name, value in figures.items():
            print(f"{part:<15}{name:<36}{value}", flush=True)
        if self.file:
            # Replace the file at once, so that it is whole whenever the run is cut short.
            partial = self.file.with_name(self.file.name + ".partial")
            partial.write_text(json.dumps(self.figures, indent=2) + "\n")
            os.replace(partial, self.file)

    def stop_in_time(self) -> None:
        """Ends the process when the time is over, even in the middle of a compilation."""

        def stop():
            self.add("environment", stopped="the time is over")
            os._exit(0)

        timer = threading.Timer(max(self.end - time.monotonic(), 0), stop)
        timer.daemon = True
        timer.start()

    def run(self, part: str, measure: Callable[[], None], least_seconds: float) -> None:
        """Runs a part if enough time is left. An error becomes a figure."""
        if self.end - time.monotonic() < least_seconds:
            self.add(part, skipped=f"less than {least_seconds:.0f} s were left")
            return
        start = time.monotonic()
        try:
            measure()
        except Exception as error:  # the other parts are still worth measuring
            self.add(part, error=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        self.add(part, part_seconds=time.monotonic() - start)


def time_program(function: Callable, *arrays, seconds: float) -> tuple[dict[str, float], object]:
    """Compiles a function and times it. Returns its figures and its result."""
    start = time.monotonic()
    program = jax.jit(function).lower(*arrays).compile()
    compile_seconds = time.monotonic() - start
    result = jax.block_until_ready(program(*arrays))
    durations = repeat(lambda: jax.block_until_ready(program(*arrays)), seconds)
    memory = program.memory_analysis()
    figures = {
        "ms": 1e3 * statistics.median(durations),
        "best_ms": 1e3 * min(durations),
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "compile_s": compile_seconds,
    }
    return figures, result


def repeat(call: Callable[[], object], seconds: float) -> list[float]:
    """Returns the durations of at least three calls, and of more until the time is over."""
    durations = []
    while len(durations) < 3 or sum(durations) < seconds:
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return durations


def named(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    """Returns the figures with a prefix."""
    return {f"{prefix}_{name}": value for name, value in figures.items()}


def environment(report: Report) -> None:
    """Reports the device and the versions."""
    device = jax.devices()[0]
    missing = {"tokamax": attention_tokamax.unavailable(), "flash": attention_flash.unavailable()}
    report.add(
        "environment",
        device=device.device_kind,
        devices=len(jax.devices()),
        compute_capability=str(getattr(device, "compute_capability", None)),
        jax=jax.__version__,
        python=sys.version.split()[0],
        default_attention=attention.default_kernel(device),
        **{f"{kernel}_missing": reason for kernel, reason in missing.items() if reason},
    )


def matmul(report: Report, sizes: Sizes) -> None:
    """Measures one product of the size of ALIGN's."""
    queries, keys = align_inputs(sizes)[:2]
    figures, _ = time_program(lambda queries, keys: queries @ keys.T, queries, keys, seconds=sizes.seconds)
    report.add("matmul", **figures, tflops=product_flops(sizes) / figures["ms"] / 1e9)


def product_flops(sizes: Sizes) -> float:
    """Returns the FLOPs of one product [T, D] x [D, V]."""
    return 2.0 * np.prod(sizes.align, dtype=float)


def align_inputs(sizes: Sizes) -> tuple[jax.Array, ...]:
    """Returns queries, keys, scale, bias, values and a cotangent, in bfloat16."""
    num_queries, width, words = sizes.align
    keys = jax.random.split(jax.random.key(0), 4)
    normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    return (
        normal(keys[0], (num_queries, width)),
        normal(keys[1], (words, width)) * 0.02,
        jnp.full((words,), 2, jnp.bfloat16),
        jnp.zeros((words,), jnp.bfloat16),
        normal(keys[2], (words, width)) * 0.02,
        normal(keys[3], (num_queries, width)),
    )


def align(report: Report, sizes: Sizes) -> None:
    """Measures ALIGN over the vocabulary: ours, the dense form, and PyTorch's."""
    inputs = align_inputs(sizes)

    def with_gradients(attend, *arrays):
        mixed, pull_back = jax.vjp(attend, *arrays[:5])
        return mixed, pull_back(arrays[5])

    def add(name, figures):
        rate = _DENSE_PRODUCTS * product_flops(sizes) / figures["ms"] / 1e9
        share = rate / report.figures.get("matmul", {}).get("tflops", float("nan"))
        report.add("align", **named(name, {**figures, "tflops": rate, "of_matmul_rate": share}))

    for name, attend in (("ours", vocabulary_attention), ("dense", dense_vocabulary_attention)):
        try:
            figures, _ = time_program(functools.partial(with_gradients, attend), *inputs, seconds=sizes.seconds)
            add(name, figures)
        except Exception as error:  # the dense form may need more memory than there is
            report.add("align", **{f"{name}_error": f"{type(error).__name__}: {str(error)[:200]}"})
    add_torch(report, sizes, add)


def add_torch(report: Report, sizes: Sizes, add: Callable) -> None:
    """Measures the dense form in PyTorch, if PyTorch has a GPU."""
    try:
        import torch
    except ImportError:
        report.add("align", torch_skipped="torch is not installed")
        return
    if not torch.cuda.is_available():
        report.add("align", torch_skipped="torch has no GPU")
        return
    num_queries, width, words = sizes.align
    options = dict(device="cuda", dtype=torch.bfloat16)
    queries = torch.randn(num_queries, width, **options)
    keys, values = (0.02 * torch.randn(words, width, **options) for _ in range(2))
    scale, bias = torch.full((words,), 2.0, **options), torch.zeros(words, **options)
    leaves = [leaf.requires_grad_(True) for leaf in (queries, keys, scale, bias, values)]
    cotangent = torch.randn(num_queries, width, **options)

    @torch.compile
    def dense(queries, keys, scale, bias, values):
        scores = torch.nn.functional.layer_norm(queries @ keys.T, (words,), scale, bias)
        return torch.softmax(scores, dim=-1) @ values

    def both():
        torch.autograd.grad(dense(*leaves), leaves, cotangent)
        torch.cuda.synchronize()

    start = time.monotonic()
    both()
    compile_seconds = time.monotonic() - start
    torch.cuda.reset_peak_memory_stats()
    durations = repeat(both, sizes.seconds)
    memory = torch.cuda.max_memory_allocated() / 1e9
    add("torch_compile", {"ms": 1e3 * statistics.median(durations), "peak_gb": memory, "compile_s": compile_seconds})


def attention_kernels(report: Report, sizes: Sizes) -> None:
    """Measures the attention kernels that are installed, and their differences from "xla"."""
    length, heads, kv_heads, width = sizes.attention
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = [(1, length, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    query, key, value, cotangent = (
        jax.random.normal(rng, shape, jnp.bfloat16) for rng, shape in zip(keys, shapes, strict=True)
    )
    segment_ids = jnp.asarray(np.repeat([[1, 2]], [length // 2, length - length // 2], axis=1), jnp.int32)
    # Pairs of a query and a key that it attends to; each takes two products of the width of a head.
    pairs = sum(n * (n + 1) / 2 for n in (length // 2, length - length // 2))
    flops = 4.0 * pairs * heads * width

    on_gpu = jax.default_backend() == "gpu"
    candidates = [("tokamax", attention_tokamax), ("flash", attention_flash)] if on_gpu else []
    kernels = ["xla", *(name for name, module in candidates if module.unavailable() is None)]
    results = {}
    for kernel in kernels:
        attend = functools.partial(attention.packed_attention, causal=True, kernel=kernel)

        def with_gradients(query, key, value, segment_ids, cotangent, attend=attend):
            attended, pull_back = jax.vjp(functools.partial(attend, segment_ids=segment_ids), query, key, value)
            return attended, *pull_back(cotangent)

        try:
            arrays = (query, key, value, segment_ids, cotangent)
            both, results[kernel] = time_program(with_gradients, *arrays, seconds=sizes.seconds)
            report.add("attention", **named(kernel, {**both, "tflops": 3 * flops / both["ms"] / 1e9}))
            forward, _ = time_program(
                lambda query, key, value, segment_ids, attend=attend: attend(
                    query, key, value, segment_ids=segment_ids
                ),
                *arrays[:4],
                seconds=sizes.seconds,
            )
            report.add(
                "attention", **named(f"{kernel}_forward", {"ms": forward["ms"], "tflops": flops / forward["ms"] / 1e9})
            )
        except Exception as error:  # the other kernels are still worth measuring
            report.add("attention", **{f"{kernel}_error": f"{type(error).__name__}: {str(error)[:400]}"})
    for kernel in set(results) - {"xla"}:
        names = ("out", "dq", "dk", "dv")
        pairs_of_arrays = zip(names, results[kernel], results["xla"], strict=True)
        report.add("attention", **{f"{kernel}_{name}_error": difference(a, b) for name, a, b in pairs_of_arrays})


def difference(a: jax.Array, b: jax.Array) -> float:
    """Returns the norm of the difference of two arrays, relative to the second one."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def train(report: Report, sizes: Sizes, part: str, model: AlignVLMConfig, trainable: tuple[str, ...]) -> None:
    """Measures training steps of a model on one bin of two full pages."""
    device = jax.devices()[0]
    model = dataclasses.replace(
        model,
        vision=hardware.resolve(model.vision, device),
        language=hardware.resolve(model.language, device),
    )
    stage = StageConfig("check", (MixturePart("random"),), trainable, steps=1000)
    batch, contents = full_bin(sizes, model)
    needed = train_flops(model, trainable, **contents).total
    mesh = make_mesh(MeshConfig(data=1), [device])
    with jax.set_mesh(mesh):
        shardings = state_shardings(model, stage, mesh)

        @functools.partial(jax.jit, out_shardings=shardings)
        def initial_state(rng):
            return create_state(stage, nn.unbox(random_parameters(model, rng)))

        state = initial_state(jax.random.key(0))
        start = time.monotonic()
        program = jit_train_step(model, stage, mesh).lower(state, batch).compile()
        memory = program.memory_analysis()
        report.add(
            part,
            attention=model.language.attention,
            remat=model.language.remat,
            compile_s=time.monotonic() - start,
            state_gb=memory.argument_size_in_bytes / 1e9,
            temporary_gb=memory.temp_size_in_bytes / 1e9,
            needed_tflop=needed / 1e12,
            tokens=contents["tokens"],
        )

        def step():
            nonlocal state
            state, metrics = program(state, batch)
            return float(metrics["loss"])

        losses = [step(), step()]
        duration = statistics.median(repeat(step, sizes.seconds))
    chip = find_chip(device.device_kind)
    rates = {"mfu": needed / duration / chip.peak_flops} if chip else {}
    measured = report.figures.get("matmul", {}).get("tflops")
    rates |= {"of_matmul_rate": needed / duration / 1e12 / measured} if measured else {}
    report.add(part, step_s=duration, tokens_per_s=contents["tokens"] / duration, loss=losses[0], **rates)


def full_bin(sizes: Sizes, model: AlignVLMConfig) -> tuple[dict[str, jax.Array], dict[str, float]]:
    """Returns a batch [1, 1, L] of two pages of random pixels and tokens, and what the FLOPs are counted from."""
    rng = np.random.default_rng(0)
    visual = sizes.tiles * tokens_per_tile(model)
    page, answers = visual + sizes.text, max(1, sizes.text // 4)
    in_page, side = np.arange(page), model.vision.image_size
    is_visual = in_page < visual
    tokens = rng.integers(0, model.language.vocab_size, (2, page))
    pages = {
        "tokens": np.where(is_visual, 0, tokens),
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": np.tile((in_page >= page - answers).astype(np.float32), (2, 1)),
        "segment_ids": np.tile([[1], [2]], (1, page)),
        "positions": np.tile(in_page, (2, 1)),
        "visual_index": np.where(is_visual, in_page + np.array([[0], [visual]]), -1),
    }
    batch = {name: values.reshape(1, 1, -1) for name, values in pages.items()}
    batch = {name: values.astype(np.float32 if name == "loss_weights" else np.int32) for name, values in batch.items()}
    batch["tiles"] = rng.integers(0, 256, (1, 1, 2 * sizes.tiles, side, side, 3), dtype=np.uint8)
    batch["tile_valid_hw"] = np.full((1, 1, 2 * sizes.tiles, 2), side, np.int32)
    contents = dict(tiles=2 * sizes.tiles, tokens=2 * page, answer_tokens=2 * answers, squared_lengths=2 * page**2)
    return {name: jnp.asarray(batch[name]) for name in FIELDS}, contents


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=as_path, metavar="FILE", help="write the figures to this file as they come")
    parser.add_argument("--minutes", type=float, default=10, help="end after this time (default: 10)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a test on a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these parts")
    args = parser.parse_args(argv)

    report, sizes = Report(args.json, args.minutes), TINY if args.tiny else REAL
    report.stop_in_time()
    environment(report)
    for part in args.parts:
        measure, least_seconds = PARTS[part]
        report.run(part, functools.partial(measure, report, sizes), 0 if args.tiny else least_seconds)
    return 0


def train_1b(report: Report, sizes: Sizes) -> None:
    """Measures the step of the 1B model with all parts trained."""
    train(report, sizes, "train_1b", sizes.model_1b, ("vision", "connector", "language"))


def train_1b_kept(report: Report, sizes: Sizes) -> None:
    """Measures the step of the 1B model with less recomputation."""
    model = sizes.model_1b
    language = dataclasses.replace(model.language, remat="attention_out,qkv")
    train(
        report,
        sizes,
        "train_1b_kept",
        dataclasses.replace(model, language=language),
        ("vision", "connector", "language"),
    )


def frozen_8b(report: Report, sizes: Sizes) -> None:
    """Measures the step of the 8B model with only the connector trained."""
    train(report, sizes, "frozen_8b", sizes.model_8b, ("connector",))


PARTS = {
    "matmul": (matmul, 20),
    "align": (align, 60),
    "attention": (attention_kernels, 60),
    "train_1b": (train_1b, 90),
    "frozen_8b": (frozen_8b, 120),
    "train_1b_kept": (train_1b_kept, 90),
}
"""The parts, in order, each with the seconds that it needs at least."""


if __name__ == "__main__":
    sys.exit(main())
