"""Compiles the training and decoding steps for TPUs that need not be attached, and reports their cost.

Axis letters: K microbatches, B bins (rows), M tiles per bin, L positions per bin.

    report = compile_train_step(experiment, topology_devices("v5e:16x16"), stage_index=2)
    report["fits"], report["per_chip_bytes"], report["capacity_bytes"]

Every bin is assumed to be full of pages of the largest size: as many pages as fit in M tiles, each with up to
`TEXT_TOKENS` tokens of text, if L leaves room for them. Each page is an example. With trees, the text is in the
branches of the pages, and each branch is an example. A step has the bins that `global_batch` examples need, rounded up
to whole microbatches. (A real run needs fewer bins, because several smaller pages share a bin. It measures how many
do.)
"""

import dataclasses
import functools
import importlib.metadata
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import hardware
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, example_batch, parameter_shapes, tokens_per_tile
from alignvlm_jax.models.language import empty_cache
from alignvlm_jax.ops import attention_splash
from alignvlm_jax.parallel import hlo_collectives, hlo_schedule, hlo_work, sharding
from alignvlm_jax.parallel.chips import Chip, find_chip
from alignvlm_jax.parallel.hlo import Program
from alignvlm_jax.parallel.hlo_attention import ExecutedBlocks, all_blocks
from alignvlm_jax.parallel.mesh import make_mesh, num_batch_shards
from alignvlm_jax.training import remat_choice
from alignvlm_jax.training.flops import train_flops
from alignvlm_jax.training.train_step import TEXT_FIELDS, abstract_state, batch_fields, jit_train_step, without_images

TEXT_TOKENS = 2048
"""Largest number of text tokens of a page; a quarter of them are answers."""

_USABLE_MEMORY = 0.96
"""Usable share of a chip's memory: XLA reserves the rest (it reports 15.48 of a v5e's 16 GiB, 30.75 of a v4's 32)."""

Report = dict[str, Any]


def compile_train_step(
    experiment: ExperimentConfig,
    devices: Sequence[jax.Device],
    *,
    stage_index: int = 0,
    slices: int = 1,
    rows_per_device: int = 1,
    text_length: int | None = None,
    questions: int = 1,
    write_text: Callable[[str], object] = lambda text: None,
) -> Report:
    """Lowers and compiles a stage's training step.

    Args:
      experiment: gives model, mesh, stage and the shape of the bins.
      devices: devices of a topology.
      stage_index: index of the stage.
      slices: number of slices that the devices form.
      rows_per_device: bins in a microbatch per position along `data` x `fsdp`.
      text_length: if given, the step trains the decoder alone, with one microbatch of rows that are one text of this
        length each. Every position has a target. This is the step of a language model.
      questions: branches of each page, if the config groups questions as trees.
      write_text: receives the text of the compiled program.

    Returns:
      The report: whether the step fits, memory by kind, collectives, kernels, FLOPs and estimated times.

    Raises:
      UserError: if mesh, bins and devices do not fit together.
    """
    mesh = make_mesh(experiment.mesh, devices, slices=slices)
    model = resolve(experiment.model, devices[0])
    stage = compilable_stage(experiment, stage_index)
    is_text_only = text_length is not None

    # Shapes of the batch.
    bins = rows_per_device * num_batch_shards(mesh)
    packing = experiment.data.packing
    if is_text_only:
        stage = dataclasses.replace(stage, trainable=("language",))
        length, tiles, pages, microbatches, fields, branch_tokens = text_length, 1, 1, 1, TEXT_FIELDS, None
    else:
        branch_tokens = experiment.data.branch_tokens
        length, tiles = packing.tokens_per_bin, packing.tiles_per_bin
        fields = batch_fields(model, is_tree=branch_tokens is not None)
        pages = max(1, tiles // experiment.data.tiling.max_tiles_per_image)
        microbatches = max(1, math.ceil(stage.global_batch / (bins * pages * questions)))
    shapes = jax.eval_shape(lambda: example_batch(model, rows=bins, tiles=tiles, length=length))
    shapes["branch_ids"] = shapes["segment_ids"]
    batch_sharding = NamedSharding(mesh, sharding.BATCH_SPEC)
    batch = {
        name: jax.ShapeDtypeStruct((microbatches, *leaf.shape), leaf.dtype, sharding=batch_sharding)
        for name, leaf in shapes.items()
        if name in fields
    }

    chip, num_chips = find_chips(devices)
    with jax.set_mesh(mesh):
        state = abstract_state(model, stage, mesh)
        state = without_images(state) if is_text_only else state
        options = dict(
            gradient_dtype=experiment.mesh.gradient_dtype, is_text_only=is_text_only, branch_tokens=branch_tokens
        )
        make_step = functools.partial(jit_train_step, stage=stage, mesh=mesh, **options)
        model, choice, program = _compile_least_recomputation(
            make_step, model, (state, batch), mesh, capacity_bytes(chip)
        )
        compiled, seconds, text, failure = program
    write_text(text)

    # FLOPs that the model needs for the full bins.
    if is_text_only:
        contents = text_contents(length)
    elif branch_tokens is not None:
        contents = _tree_contents(model, tiles, length, pages, questions, branch_tokens)
    else:
        contents = _contents(model, tiles, length, pages)
    total_bins = bins * microbatches
    needed = train_flops(model, stage.trainable, **{name: total_bins * count for name, count in contents.items()})
    # The loss loops over the chunks that contain answer tokens: over those whose numbers it keeps, and over the others.
    # These are the only loops whose number of iterations depends on the data and is not part of the program.
    chunk = min(2048, max(256, rows_per_device * length // 16))
    chunks = max(1.0, rows_per_device * contents["answer_tokens"] / chunk)
    words = model.language.vocab_size // mesh.shape["tensor"]
    kept = (model.language.loss_memory_mib << 20) // (chunk * words * jnp.dtype(model.language.dtype).itemsize)
    chunks_of_loop = {"kept": min(chunks, kept), "not_kept": max(0.0, chunks - kept)}
    program = Program(text, trips=lambda op_name: chunks_of_loop.get(op_name.split("/")[-2:][0], chunks))
    memory = {
        "parameters": bytes_per_device(state.params),
        "optimizer": bytes_per_device(state.opt_state),
        "batch": bytes_per_device(batch),
    }

    in_branches = 0 if branch_tokens is None else int(contents["tokens"]) - tiles * tokens_per_tile(model)
    executed_blocks = full_bin_blocks(length, int(contents["tokens"]), pages, in_branches)
    report = _report(program, compiled, failure, chip, mesh, memory, executed_blocks)
    flops = {part.name: getattr(needed, part.name) for part in dataclasses.fields(needed)}
    report |= {
        "what": "training step of the decoder alone"
        if is_text_only
        else f"stage {stage_index + 1} ({stage.name}), training step",
        "trainable": list(stage.trainable),
        "chip": chip.name,
        "num_chips": num_chips,
        "slices": slices,
        "mesh": dict(mesh.shape),
        "bins_per_microbatch": bins,
        "microbatches": microbatches,
        "bins": total_bins,
        "examples": total_bins * pages * questions,
        "questions_per_page": questions,
        "branch_tokens_per_bin": branch_tokens,
        "tokens": total_bins * contents["tokens"],
        "tiles": total_bins * contents["tiles"],
        "flops": needed.total,
        "flops_by_part": flops,
        "compile_seconds": seconds,
        "attention": _kernels(program, ("decoder",) if is_text_only else ("encoder", "decoder")),
        "remat": {"encoder": model.vision.remat, "decoder": model.language.remat},
        "remat_trials": [{**dataclasses.asdict(trial), "remat": str(trial.remat)} for trial in choice.trials]
        if choice
        else [],
        "versions": _versions(),
    }
    if compiled is not None:
        estimate, shortest = report["estimate"], needed.total / num_chips / chip.peak_flops
        report["executed_flops_per_example"] = report["executed_flops_per_chip"] * num_chips / report["examples"]
        report["executed_over_needed"] = report["executed_flops_per_chip"] * num_chips / needed.total
        estimate["model_flops_utilization"] = shortest / estimate["step_seconds_if_all_overlaps"]
        if "step_seconds_by_schedule" in estimate:
            estimate["model_flops_utilization_by_schedule"] = shortest / estimate["step_seconds_by_schedule"]
    return report


def compilable_stage(experiment: ExperimentConfig, index: int) -> StageConfig:
    """Returns a stage with a number of steps, which the schedules need. It does not change the cost of a step."""
    stage = dataclasses.replace(experiment.stages[index], steps=1000, epochs=None)
    return dataclasses.replace(stage, warmup_steps=min(stage.warmup_steps, 999))


def compile_decoding(
    experiment: ExperimentConfig,
    devices: Sequence[jax.Device],
    *,
    rows_per_device: int = 1,
    answer_tokens: int = 128,
    write_text: Callable[[str], object] = lambda text: None,
) -> dict[str, Report]:
    """Lowers and compiles the two programs of generation: reading a full page ("prefill"), and one token ("decode").

    Args:
      experiment: gives model and mesh. Weights are bfloat16.
      devices: devices of a topology.
      rows_per_device: questions per position along `data` x `fsdp`.
      answer_tokens: number of cache slots after the prompt.
      write_text: receives the text of each compiled program.

    Returns:
      A report for each program, by its name.
    """
    # Shapes and shardings of weights, cache, batch and tokens.
    mesh = make_mesh(experiment.mesh, devices)
    model, packing = resolve(experiment.model, devices[0]), experiment.data.packing
    rows = rows_per_device * num_batch_shards(mesh)
    boxed = parameter_shapes(model)
    params = jax.tree.map(
        lambda leaf, placement: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=placement),
        nn.unbox(boxed),
        sharding.parameter_shardings(boxed, mesh),
    )
    row_sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    # The heads of the cache are sharded only if their number is divisible by the size of the `tensor` axis.
    head_axis = "tensor" if model.language.num_kv_heads % mesh.shape["tensor"] == 0 else None
    kv_sharding = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"), head_axis))

    def with_shardings(tree, sharding_of):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf)), tree)

    def cache_sharding(leaf):
        # By rank: 0 for scalars, 5 for keys and values, which begin with layers, rows and heads; all others begin with
        # rows.
        return {0: NamedSharding(mesh, PartitionSpec()), 5: kv_sharding}.get(leaf.ndim, row_sharding)

    batch = jax.eval_shape(
        lambda: example_batch(model, rows=rows, tiles=packing.tiles_per_bin, length=packing.tokens_per_bin)
    )
    batch = with_shardings(batch, lambda leaf: row_sharding)
    slots = packing.tokens_per_bin + answer_tokens
    cache = with_shardings(jax.eval_shape(lambda: empty_cache(model.language, rows, slots)), cache_sharding)
    tokens = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=row_sharding)
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
    chip, num_chips = find_chips(devices)
    reports = {}
    for name, (function, argument) in programs.items():
        with jax.set_mesh(mesh), sharding.logical_rules():
            # The cache is donated and keeps its shardings, as in a real decoding loop.
            out_shardings = (row_sharding, jax.tree.map(cache_sharding, cache))
            jitted = jax.jit(function, donate_argnums=1, out_shardings=out_shardings)
            compiled, seconds, text, failure = _compile(jitted, params, cache, argument)
        write_text(text)
        program = Program(text)
        memory = {"parameters": bytes_per_device(params), "cache": bytes_per_device(cache)}
        reports[name] = _report(program, compiled, failure, chip, mesh, memory) | {
            "what": f"{name}, {rows} questions at once, each a page of {packing.tiles_per_bin} tiles",
            "chip": chip.name,
            "num_chips": num_chips,
            "mesh": dict(mesh.shape),
            "compile_seconds": seconds,
            "attention": _kernels(program, ("encoder", "decoder")) if name == "prefill" else {},
            "versions": _versions(),
        }
    return reports


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}


def resolve(config: AlignVLMConfig, device: jax.Device) -> AlignVLMConfig:
    """Returns the config with the dtypes and attention kernels that the model uses on a device."""
    return dataclasses.replace(
        config, vision=hardware.resolve(config.vision, device), language=hardware.resolve(config.language, device)
    )


def _compile(function, *arguments):
    """Returns the compiled program (None if it does not fit), the seconds it took, its text, and the error if any."""
    start_time = time.monotonic()
    lowered = function.lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, time.monotonic() - start_time, "", str(error)
    return compiled, time.monotonic() - start_time, compiled.as_text(), None


def _compile_least_recomputation(make_step, model: AlignVLMConfig, arguments, mesh: Mesh, capacity: int):
    """Compiles a step with the least recomputation that fits, where the model says "auto".

    Returns:
      The model that is compiled, the choice (None if nothing is to be chosen), and the result of `_compile`.
    """
    if not remat_choice.is_auto(model):
        return model, None, _compile(make_step(model), *arguments)
    steps, results = {}, {}

    def lower_bound(remat):
        steps[remat] = make_step(remat_choice.with_remat(model, remat))
        return remat_choice.least_bytes(steps[remat].trace(*arguments), arguments, mesh.size)

    def compile(remat):
        results[remat] = _compile(steps[remat], *arguments)
        compiled = results[remat][0]
        return None if compiled is None else remat_choice.required_bytes(compiled)

    choice = remat_choice.choose_remat(lower_bound, compile, capacity)
    if choice.remat not in results:
        compile(choice.remat)  # none fits: report how much the last one needs
    return remat_choice.with_remat(model, choice.remat), choice, results[choice.remat]


def capacity_bytes(chip: Chip) -> int:
    """Returns the memory of a device that a program can use, in bytes."""
    return int(_USABLE_MEMORY * chip.hbm_bytes / chip.devices_per_chip)


def _contents(model: AlignVLMConfig, tiles: int, length: int, pages: int) -> dict[str, float]:
    """Returns the numbers of tiles and tokens of a full bin, by the names of `train_flops`' arguments."""
    visual = tiles * tokens_per_tile(model)
    tokens = min(length, visual + pages * TEXT_TOKENS)
    if tokens - visual < 2:
        raise UserError(
            f"config.data.packing.tokens_per_bin: {tiles} tiles are {visual} visual tokens, and a bin of {length} "
            "tokens has no room left for a question and an answer"
        )
    return {
        "tiles": tiles,
        "tokens": tokens,
        "answer_tokens": max(1, (tokens - visual) // 4),
        "squared_lengths": float(tokens) ** 2 / pages,
    }


def _tree_contents(
    model: AlignVLMConfig, tiles: int, length: int, pages: int, questions: int, branch_tokens: int
) -> dict[str, float]:
    """Returns the same numbers for a full bin of trees, whose text is spread evenly over the branches."""
    contents = _contents(model, tiles, min(length, tiles * tokens_per_tile(model) + branch_tokens), pages)
    page = tiles * tokens_per_tile(model) / pages
    branch = (contents["tokens"] / pages - page) / questions
    # Positions continue from the page in every branch: they are those of a segment of page and branch, without the
    # page's own in all branches but one.
    squares = page**2 + questions * ((page + branch) ** 2 - page**2)
    return contents | {"squared_lengths": pages * squares}


def text_contents(length: int) -> dict[str, float]:
    """Returns the same numbers for a row that is one text, in which every position has a target."""
    return {"tiles": 0, "tokens": length, "answer_tokens": length, "squared_lengths": float(length) ** 2}


def full_bin_blocks(length: int, tokens: int, pages: int, branch_tokens: int = 0) -> ExecutedBlocks:
    """Returns the blocks that the splash kernels run for pages of equal length, followed by padding.

    Args:
      length: L.
      tokens: number of positions that are not padding.
      pages: number of pages.
      branch_tokens: number of these positions that are in branches, at the end of each page. They do not attend in
        the kernel, for which they are padding.
    """
    segment_ids = np.zeros((1, length), np.int32)
    positions = np.arange(tokens)
    page, place = positions * pages // tokens, positions * pages % tokens / pages
    segment_ids[0, :tokens] = np.where(place < (tokens - branch_tokens) / pages, 1 + page, 0)
    in_decoder = attention_splash.executed_blocks(segment_ids, causal=True)
    # A tile of the encoder is one segment, and no tile of a full bin is padding.
    return lambda kernel, num_blocks, causal: in_decoder[kernel] if causal else all_blocks(kernel, num_blocks, causal)


def _report(
    program: Program, compiled, failure, chip: Chip, mesh: Mesh, memory, executed_blocks: ExecutedBlocks = all_blocks
) -> Report:
    """Returns the part of the report that training and decoding share.

    Args:
      program: the parsed program; empty if it does not fit.
      compiled: the compiled program, or None if it does not fit.
      failure: the compiler's error, or None.
      chip: data of the chips.
      mesh: the mesh.
      memory: bytes per device of the program's arguments.
      executed_blocks: the blocks of a row that attention kernels run.
    """
    capacity = capacity_bytes(chip)

    # Bytes that each device sends, by kind of collective and by network: within a slice (ICI), between slices (DCN).
    slice_of = [getattr(device, "slice_index", 0) for device in mesh.devices.flat]
    collectives = hlo_collectives.collectives(program, slice_of)
    traffic = {}
    for collective in collectives:
        networks = traffic.setdefault(collective.kind, {"ici": 0.0, "dcn": 0.0})
        networks["dcn" if collective.crosses_slices else "ici"] += collective.count * collective.bytes_sent
    ici, dcn = (sum(networks[name] for networks in traffic.values()) for name in ("ici", "dcn"))

    # Times if each resource were the only limit. A collective of one ring uses two links; the others are idle.
    executed = sum(hlo_work.flops(program, executed_blocks).values())
    share = 1 / chip.devices_per_chip
    seconds = {
        "products": executed / (chip.peak_flops * share),
        "memory": hlo_work.bytes_moved(program) / (chip.hbm_bandwidth * share),
        "ici": sum(hlo_schedule.collective_seconds(chip, each) for each in collectives if not each.crosses_slices),
        "dcn": dcn / (chip.dcn_bandwidth * share),
    }
    estimate = {"seconds": seconds, "step_seconds_if_all_overlaps": max(seconds.values())}
    schedule = hlo_schedule.schedule_seconds(program, chip, collectives, executed_blocks)
    if schedule is not None:
        # Messages between slices have the whole step to arrive.
        scheduled = max(sum(schedule.values()), seconds["dcn"])
        estimate |= {"seconds_by_schedule": schedule, "step_seconds_by_schedule": scheduled}

    # Memory besides the arguments. Results that reuse a donated argument's memory are not counted twice.
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
        "executed_flops_per_chip": executed * chip.devices_per_chip,
        "estimate": estimate,
        "largest_buffers": [
            {"bytes": size, "shape": shape, "from": origin}
            for size, shape, origin in hlo_work.largest_buffers(program, 8)
        ],
        "failure": failure,
        "advice": [] if fits else _advice(memory, capacity),
    }


def _advice(memory: dict[str, float], capacity: int) -> list[str]:
    """Returns the changes that would make the program fit, the most effective first."""
    held = memory["parameters"] + memory.get("optimizer", 0) + memory.get("cache", 0)
    spread = "spread the weights further: more chips, or mesh.fsdp=-1 with data=1"
    if held > capacity / 2:
        return [spread, "a chip with more memory"]
    return [
        "fewer bins at a time: --rows-per-device 1, and config.data.packing.bins_per_microbatch to match",
        "recompute more: config.model.language.remat=auto, config.model.vision.remat=auto",
        "split each bin across several chips: mesh.tensor=2 or 4",
        "smaller bins: config.data.packing.tokens_per_bin and tiles_per_bin, with data.tiling.max_tiles",
        spread,
    ]


def _kernels(program: Program, parts: Sequence[str]) -> dict[str, str]:
    """Returns the attention kernel of parts of the model, as found in the program."""
    modules, names = {"encoder": "vision", "decoder": "language"}, hlo_work.kernels(program)
    return {
        part: "splash" if any(name.startswith(f"{modules[part]}: splash") for name in names) else "xla"
        for part in parts
    }


def find_chips(devices: Sequence[jax.Device]) -> tuple[Chip, int]:
    """Returns the kind of the devices' chips, and the number of chips."""
    chip = find_chip(devices[0].device_kind)
    if chip is None:
        raise UserError(f"{devices[0].device_kind} is not a known chip: add it to parallel/chips.py")
    return chip, len(devices) // chip.devices_per_chip


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes of a tree of arrays, or of their shapes and shardings, on each device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
