"""Compiles the real training and decoding steps for TPUs that are not there, and reads off what they will take.

Axis letters: K microbatches, B bins (rows), M tiles per bin, L positions per bin.

    report = compile_train_step(experiment, topology_devices("v5e:16x16"), stage_index=2)
    report["fits"], report["per_chip_bytes"], report["capacity_bytes"]

Every bin is taken to be full of the largest pages there are: as many as M tiles hold, with `TEXT_TOKENS` of text as far
as L leaves room. Each is an example, and a step has the bins that the stage's `global_batch` of them needs, in whole
microbatches. (Smaller pages share bins: a run measures how many of its examples do, and takes fewer bins.)
"""

import dataclasses
import importlib.metadata
import math
import time
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import hardware
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, example_batch, random_parameters, tokens_per_tile
from alignvlm_jax.models.language import empty_cache
from alignvlm_jax.parallel import hlo_collectives, hlo_work, sharding
from alignvlm_jax.parallel.chips import Chip, find_chip
from alignvlm_jax.parallel.hlo import Program
from alignvlm_jax.parallel.mesh import make_mesh, num_batch_shards
from alignvlm_jax.training.flops import train_flops
from alignvlm_jax.training.train_step import FIELDS, abstract_state, jit_train_step

TEXT_TOKENS = 2048
"""Of a page, at most; a quarter of them answers."""

_USABLE = 0.96
"""Of a chip's memory: XLA keeps some for itself (it reports 15.48 of a v5e's 16 GiB, 30.75 of a v4's 32)."""

Report = dict[str, Any]


def compile_train_step(
    experiment: ExperimentConfig,
    devices: Sequence[jax.Device],
    *,
    stage_index: int = 0,
    slices: int = 1,
    rows_per_device: int = 1,
) -> Report:
    """Lowers and compiles a stage's training step.

    Args:
      experiment: its model, mesh, stage and the shape of its bins are taken.
      devices: of a topology.
      stage_index: which of its stages.
      slices: into how many slices the devices fall.
      rows_per_device: bins in a microbatch for each place along `data` x `fsdp`.

    Raises:
      UserError: mesh, bins and devices do not go together.
    """
    mesh = make_mesh(experiment.mesh, devices, slices=slices)
    model = resolve(experiment.model, devices[0])
    stage = dataclasses.replace(experiment.stages[stage_index], steps=1000, epochs=None)
    stage = dataclasses.replace(stage, warmup_steps=min(stage.warmup_steps, 999))
    bins = rows_per_device * num_batch_shards(mesh)
    packing = experiment.data.packing
    pages = max(1, packing.tiles_per_bin // experiment.data.tiling.max_tiles_per_image)
    microbatches = max(1, math.ceil(stage.global_batch / (bins * pages)))
    shapes = jax.eval_shape(
        lambda: example_batch(model, rows=bins, tiles=packing.tiles_per_bin, length=packing.tokens_per_bin)
    )
    where = NamedSharding(mesh, sharding.BATCH_SPEC)
    batch = {
        name: jax.ShapeDtypeStruct((microbatches, *leaf.shape), leaf.dtype, sharding=where)
        for name, leaf in shapes.items()
        if name in FIELDS
    }
    with jax.set_mesh(mesh):
        state = abstract_state(model, stage, mesh)
        compiled, seconds, text, failure = _compile(jit_train_step(model, stage, mesh), state, batch)

    contents = _contents(model, packing.tiles_per_bin, packing.tokens_per_bin, pages)
    total_bins = bins * microbatches
    needed = train_flops(model, stage.trainable, **{name: total_bins * count for name, count in contents.items()})
    # The answers of a bin, over the loss's chunks: the only loop whose length the data decide.
    chunk = min(2048, max(256, rows_per_device * packing.tokens_per_bin // 16))
    program = Program(text, trips=lambda _: max(1.0, rows_per_device * contents["answer_tokens"] / chunk))
    chip, num_chips = _chip(devices)
    memory = {
        "parameters": _bytes_per_device(state.params),
        "optimizer": _bytes_per_device(state.opt_state),
        "batch": _bytes_per_device(batch),
    }
    report = _report(program, compiled, failure, chip, len(devices), mesh, memory)
    flops = {part.name: getattr(needed, part.name) for part in dataclasses.fields(needed)}
    report |= {
        "what": f"stage {stage_index + 1} ({stage.name}), training step",
        "trainable": list(stage.trainable),
        "chip": chip.name,
        "num_chips": num_chips,
        "slices": slices,
        "mesh": dict(mesh.shape),
        "bins_per_microbatch": bins,
        "microbatches": microbatches,
        "bins": total_bins,
        "examples": total_bins * pages,
        "tokens": total_bins * contents["tokens"],
        "tiles": total_bins * contents["tiles"],
        "flops": needed.total,
        "flops_by_part": flops,
        "compile_seconds": seconds,
        "attention": _kernels(program),
        "versions": _versions(),
    }
    if compiled is not None:
        shortest = report["estimate"]["step_seconds_if_all_overlaps"]
        report["estimate"]["model_flops_utilization"] = needed.total / num_chips / chip.peak_flops / shortest
    return report


def compile_decoding(
    experiment: ExperimentConfig,
    devices: Sequence[jax.Device],
    *,
    rows_per_device: int = 1,
    answer_tokens: int = 128,
) -> dict[str, Report]:
    """Lowers and compiles what answers questions: reading a full page ("prefill"), one step of the answer ("decode").

    Args:
      experiment: its model and mesh are taken; weights are bfloat16.
      devices: of a topology.
      rows_per_device: questions for each place along `data` x `fsdp`.
      answer_tokens: room in the cache behind the prompt.
    """
    mesh = make_mesh(experiment.mesh, devices)
    model, packing = resolve(experiment.model, devices[0]), experiment.data.packing
    rows = rows_per_device * num_batch_shards(mesh)
    boxed = jax.eval_shape(lambda: random_parameters(model, jax.random.key(0)))
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=place),
        nn.unbox(boxed),
        sharding.parameter_shardings(boxed, mesh),
    )
    of_rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    in_heads = "tensor" if model.language.num_kv_heads % mesh.shape["tensor"] == 0 else None
    of_cache = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"), None, in_heads))

    def placed(tree, where):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where(leaf)), tree)

    def place(leaf):
        return {0: NamedSharding(mesh, PartitionSpec()), 5: of_cache}.get(leaf.ndim, of_rows)

    batch = jax.eval_shape(
        lambda: example_batch(model, rows=rows, tiles=packing.tiles_per_bin, length=packing.tokens_per_bin)
    )
    batch = placed(batch, lambda leaf: of_rows)
    slots = packing.tokens_per_bin + answer_tokens
    cache = placed(jax.eval_shape(lambda: empty_cache(model.language, rows, slots)), place)
    tokens = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=of_rows)
    network = AlignVLM(model)
    programs = {
        "prefill": (
            lambda params, cache, batch: network.apply({"params": params}, batch, cache, method="prefill"),
            batch,
        ),
        "decode": (
            lambda params, cache, tokens: network.apply(
                {"params": params}, tokens, tokens, cache, method="decode_step"
            ),
            tokens,
        ),
    }
    chip, num_chips = _chip(devices)
    reports = {}
    for name, (function, argument) in programs.items():
        with jax.set_mesh(mesh), sharding.logical_rules():
            jitted = jax.jit(function, donate_argnums=1, out_shardings=(of_rows, jax.tree.map(place, cache)))
            compiled, seconds, text, failure = _compile(jitted, params, cache, argument)
        program = Program(text)
        memory = {"parameters": _bytes_per_device(params), "cache": _bytes_per_device(cache)}
        reports[name] = _report(program, compiled, failure, chip, len(devices), mesh, memory) | {
            "what": f"{name}, {rows} questions at once, each a page of {packing.tiles_per_bin} tiles",
            "chip": chip.name,
            "num_chips": num_chips,
            "mesh": dict(mesh.shape),
            "compile_seconds": seconds,
            "attention": _kernels(program) if name == "prefill" else {},
            "versions": _versions(),
        }
    return reports


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}


def resolve(config: AlignVLMConfig, device: jax.Device) -> AlignVLMConfig:
    """The model as it will be on a device: its arithmetic and its attention kernels."""
    return dataclasses.replace(
        config, vision=hardware.resolve(config.vision, device), language=hardware.resolve(config.language, device)
    )


def _compile(function, *arguments):
    """The program, the seconds it took, its text, and why there is none."""
    started = time.monotonic()
    lowered = function.lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, time.monotonic() - started, "", str(error)
    return compiled, time.monotonic() - started, compiled.as_text(), None


def _contents(model: AlignVLMConfig, tiles: int, length: int, pages: int) -> dict[str, float]:
    """What a bin holds: pages of as many tiles as there is room for, and text."""
    visual = tiles * tokens_per_tile(model)
    tokens = min(length, visual + pages * TEXT_TOKENS)
    if tokens - visual < 2:
        raise UserError(
            f"config.data.packing.tokens_per_bin: {tiles} tiles are {visual} visual tokens, and a bin of {length} has "
            "no room for a question and an answer beside them"
        )
    return {
        "tiles": tiles,
        "tokens": tokens,
        "answer_tokens": max(1, (tokens - visual) // 4),
        "squared_lengths": float(tokens) ** 2 / pages,
    }


def _report(program: Program, compiled, failure, chip: Chip, num_devices: int, mesh: Mesh, memory) -> Report:
    capacity = int(_USABLE * chip.hbm_bytes / chip.devices_per_chip)
    slice_of = [getattr(device, "slice_index", 0) for device in mesh.devices.flat]
    collectives = hlo_collectives.collectives(program, slice_of)
    traffic = {}
    for found in collectives:
        kinds = traffic.setdefault(found.kind, {"ici": 0.0, "dcn": 0.0})
        kinds["dcn" if found.crosses_slices else "ici"] += found.count * found.bytes_sent
    ici, dcn = (sum(kinds[wire] for kinds in traffic.values()) for wire in ("ici", "dcn"))
    executed = sum(hlo_work.flops(program).values())
    share = 1 / chip.devices_per_chip
    seconds = {
        "products": executed / (chip.peak_flops * share),
        "memory": hlo_work.bytes_moved(program) / (chip.hbm_bandwidth * share),
        "ici": ici / (chip.ici_bandwidth * share),
        "dcn": dcn / (chip.dcn_bandwidth * share),
    }
    if compiled is not None:
        analysis = compiled.memory_analysis()
        memory = memory | {
            "activations": analysis.temp_size_in_bytes,
            "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
            "program": analysis.generated_code_size_in_bytes,
        }
    total = sum(memory.values())
    fits = compiled is not None and total <= capacity
    return {
        "fits": fits,
        "per_chip_bytes": total if compiled is not None else None,
        "capacity_bytes": capacity,
        "memory": memory,
        "collective_bytes": ici + dcn,
        "collectives": traffic,
        "kernels": hlo_work.kernels(program),
        "executed_flops_per_chip": executed,
        "estimate": {
            "seconds": seconds,
            "step_seconds_if_all_overlaps": max(seconds.values()),
            "step_seconds_if_nothing_overlaps": sum(seconds.values()),
        },
        "largest_buffers": [
            {"bytes": size, "shape": shape, "from": origin}
            for size, shape, origin in hlo_work.largest_buffers(program, 8)
        ],
        "failure": failure,
        "advice": [] if fits else _advice(memory, capacity),
    }


def _advice(memory: dict[str, float], capacity: int) -> list[str]:
    """What to change, what helps most first."""
    held = memory["parameters"] + memory.get("optimizer", 0) + memory.get("cache", 0)
    spread = "spread the weights further: more chips, or mesh.fsdp=-1 with data=1"
    if held > capacity / 2:
        return [spread, "a chip with more memory"]
    return [
        "fewer bins at a time: --rows-per-device 1, and config.data.packing.bins_per_microbatch to match",
        "recompute more: config.model.language.remat=full, config.model.vision.remat=full",
        "cut each bin over several chips: mesh.tensor=2 or 4",
        "smaller bins: config.data.packing.tokens_per_bin and tiles_per_bin, with data.tiling.max_tiles",
        spread,
    ]


def _kernels(program: Program) -> dict[str, str]:
    """Which attention runs in each part, by what is in the program."""
    names = hlo_work.kernels(program)
    return {
        part: "splash" if any(name.startswith(f"{module}: splash") for name in names) else "xla"
        for part, module in (("encoder", "vision"), ("decoder", "language"))
    }


def _chip(devices: Sequence[jax.Device]) -> tuple[Chip, int]:
    chip = find_chip(devices[0].device_kind)
    if chip is None:
        raise UserError(f"no figures are known of {devices[0].device_kind}: add the chip to parallel/chips.py")
    return chip, len(devices) // chip.devices_per_chip


def _bytes_per_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
