"""Chooses the least recomputation that fits in memory, for `remat="auto"`.

The candidates are tried from the least recomputation to the most. A candidate is first traced: if what its layers keep
does not fit by itself, it is not compiled, which can take many minutes then. Otherwise its step is compiled, and the
compiler says how much memory it needs. The first that fits is used.

The choice of each stage is recorded in WORKDIR/remat.json, so that a resumed run need not try again. A record counts
only for the same model, stage, batch, mesh, devices and versions.
"""

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.models.alignvlm import AlignVLMConfig
from alignvlm_jax.models.rematerialization import AUTO, CANDIDATES, Candidate
from alignvlm_jax.output_files import open_atomically
from alignvlm_jax.parallel import distributed
from alignvlm_jax.parallel.writing import call_in_primary
from alignvlm_jax.training.train_step import TrainStep

REMAT_FILE = "remat.json"

_USABLE_SHARE = 0.98
"""Share of an accelerator's memory that a step may need. The rest is for the next batch and for gaps between arrays."""

_USABLE_SHARE_OF_CPU = 0.5
"""Share of a machine's memory that the step may need on its CPU. The rest is for the data and other programs."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate that was tried.

    Attributes:
      remat: the candidate.
      num_bytes: memory that its step needs on each device; None if the compiler gave up.
      is_compiled: False if `num_bytes` is a lower bound, which is too much already.
      fits: whether the step fits in memory.
    """

    remat: Candidate
    num_bytes: int | None
    is_compiled: bool
    fits: bool


@dataclasses.dataclass(frozen=True)
class Choice:
    """The candidate that is used, and how it was found.

    Attributes:
      remat: the candidate; the last one if none fits.
      limit: usable memory of each device in bytes; None if unknown.
      trials: the candidates that were tried, in their order.
    """

    remat: Candidate
    limit: int | None
    trials: tuple[Trial, ...]


def choose_remat(
    lower_bound: Callable[[Candidate], int],
    compile: Callable[[Candidate], int | None],
    limit: int | None,
    candidates: Sequence[Candidate] = CANDIDATES,
) -> Choice:
    """Returns the first candidate whose step fits.

    Args:
      lower_bound: returns the least memory in bytes that the step of a candidate can need on each device.
      compile: compiles the step of a candidate and returns the memory that it needs; None if the compiler gives up.
      limit: usable memory of each device; None if unknown, for which the first candidate is used untried.
      candidates: the candidates, the least recomputation first.
    """
    if limit is None:
        return Choice(candidates[0], None, ())
    trials, last_bound = [], None
    for remat in candidates:
        bound = lower_bound(remat)
        if bound == last_bound:
            continue  # it differs from the one before only in a part that is frozen, or that is not "auto"
        last_bound = bound
        if bound > limit:
            trials.append(Trial(remat, bound, is_compiled=False, fits=False))
            continue
        num_bytes = compile(remat)
        trials.append(Trial(remat, num_bytes, is_compiled=True, fits=num_bytes is not None and num_bytes <= limit))
        if trials[-1].fits:
            break
    last = trials[-1].remat if trials[-1].fits else candidates[-1]
    return Choice(last, limit, tuple(trials))


def is_auto(model: AlignVLMConfig) -> bool:
    """Returns whether the recomputation of a part is still to be chosen."""
    return AUTO in (model.vision.remat, model.language.remat)


def with_remat(model: AlignVLMConfig, remat: Candidate) -> AlignVLMConfig:
    """Returns the model with a candidate in place of "auto"."""
    parts = {
        name: dataclasses.replace(part, remat=getattr(remat, name))
        for name, part in (("vision", model.vision), ("language", model.language))
        if part.remat == AUTO
    }
    return dataclasses.replace(model, **parts)


def required_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the memory that a compiled step needs on each device, arguments included."""
    analysis = compiled.memory_analysis()
    return (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.generated_code_size_in_bytes
    )


def least_bytes(traced: jax.stages.Traced, arguments: Any, num_devices: int) -> int:
    """Returns the least memory that a traced step can need on each device: its arguments and what its layers keep.

    Args:
      traced: the step.
      arguments: arrays or shapes of its arguments, with shardings.
      num_devices: number of devices that share what the layers keep.
    """
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments)
    )
    jaxpr = traced.jaxpr.jaxpr
    # Without dead code: what a layer returns to the backward pass includes values that nothing uses.
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return held + _kept_bytes(jaxpr) // num_devices


def _kept_bytes(jaxpr: Any) -> int:
    """Returns the size of what the loops over layers return for the backward pass, on all devices together."""
    total = 0
    for equation in jaxpr.eqns:
        stacked = []
        if equation.primitive.name == "scan":
            # Its results are the carry, as the body returns it, and then the stacked values, which have one axis more.
            # This holds in all versions of JAX; the parameter that counts the carry does not exist in all of them.
            returned = equation.params["jaxpr"].jaxpr.outvars
            pairs = zip(equation.outvars, returned, strict=True)
            stacked = [result for result, one in pairs if result.aval.ndim > one.aval.ndim]
            if equation.params["reverse"]:
                continue  # a loop of the backward pass
        if stacked:
            total += sum(variable.aval.size * variable.aval.dtype.itemsize for variable in stacked)
        else:
            subs = jax.extend.core.jaxprs_in_params(equation.params)
            total += sum(_kept_bytes(getattr(sub, "jaxpr", sub)) for sub in subs)
    return total


def usable_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Returns the memory of each device that a step may need, the least over this process's devices; None if unknown.

    On a CPU, devices share the memory of the machine.
    """
    stats = [device.memory_stats() or {} for device in devices]
    limits = [each["bytes_limit"] for each in stats if each.get("bytes_limit")]
    if limits:
        return int(_USABLE_SHARE * min(limits))
    if devices[0].platform != "cpu" or not hasattr(os, "sysconf"):
        return None
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(_USABLE_SHARE_OF_CPU * installed / len(devices))


def choose_step(
    model: AlignVLMConfig,
    stage: StageConfig,
    mesh: Mesh,
    make_step: Callable[[AlignVLMConfig], TrainStep],
    arguments: tuple[Any, Any],
    workdir: Path,
) -> TrainStep:
    """Returns the step with the least recomputation that fits, compiled, and records the choice in the workdir.

    All processes must call it; all return the same step.

    Args:
      model: the model. A part whose `remat` is not "auto" keeps it.
      stage: the stage of the step.
      mesh: devices of all processes.
      make_step: makes the jitted step of a model.
      arguments: state and batch of the first step.
      workdir: folder of the run.
    """
    limits = distributed.gather_json(usable_bytes([device for device in mesh.devices.flat if _is_local(device)]))
    limit = None if None in limits else min(limits)
    file, key = workdir / REMAT_FILE, _key(model, stage, mesh, arguments[1], limit)
    recorded = distributed.gather_json(_read(file, stage.name, key) if distributed.is_primary() else None)[0]
    if recorded is not None:
        recorded = Candidate(*recorded)
        distributed.log(f"remat=auto: {recorded}, as recorded in {file}")
        return make_step(with_remat(model, recorded))

    steps, traces = {}, {}

    def lower_bound(remat: Candidate) -> int:
        steps[remat] = make_step(with_remat(model, remat))
        traces[remat] = steps[remat].trace(*arguments)
        bound = least_bytes(traces[remat], arguments, mesh.size)
        if bound > limit:
            distributed.log(f"remat=auto: {remat} needs at least {_size(bound)} of {_size(limit)}")
        return bound

    def compile(remat: Candidate) -> int | None:
        distributed.log(f"remat=auto: compiling with {remat} ...")
        start_time = time.monotonic()
        num_bytes = _agree(_try_to_compile(traces[remat].lower()))
        needed = "more memory than there is" if num_bytes is None else f"{_size(num_bytes)} of {_size(limit)}"
        distributed.log(f"remat=auto: {remat} needs {needed} ({time.monotonic() - start_time:.0f} s)")
        return num_bytes

    choice = choose_remat(lower_bound, compile, limit)
    call_in_primary(lambda: _write(file, stage.name, key, choice))
    distributed.log(f"remat=auto: {describe(choice)}; recorded in {file}")
    return steps.get(choice.remat) or make_step(with_remat(model, choice.remat))


def describe(choice: Choice) -> str:
    """Returns the choice as a phrase: "attention_out,qkv, which needs 14.77 GB of 16.49 GB"."""
    if not choice.trials:
        return f"{choice.remat}, because the memory of the device is not known"
    last = choice.trials[-1]
    if not last.fits:
        return f"{choice.remat}, the most recomputation, and even that does not fit {_size(choice.limit)}"
    return f"{choice.remat}, which needs {_size(last.num_bytes)} of {_size(choice.limit)}"


def _agree(num_bytes: int | None) -> int | None:
    """Returns the largest value of all processes, None if any is None."""
    values = distributed.gather_json(num_bytes)
    return None if None in values else max(values)


def _try_to_compile(lowered: jax.stages.Lowered) -> int | None:
    """Compiles a step and returns the memory that it needs; None if it does not fit."""
    try:
        # JAX keeps the program, so the first step need not compile it again.
        return required_bytes(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _key(model: AlignVLMConfig, stage: StageConfig, mesh: Mesh, batch: Mapping[str, Any], limit: int | None) -> str:
    """Returns a digest of everything that the choice depends on."""
    device = mesh.devices.flat[0]
    facts = {
        "model": repr(model),
        "trainable": stage.trainable,
        "optimizer": repr(stage.optimizer),
        "batch": {name: [*field.shape, str(field.dtype)] for name, field in batch.items()},
        "mesh": dict(mesh.shape),
        "device": [device.device_kind, getattr(device.client, "platform_version", ""), limit],
        "versions": [jax.__version__, jaxlib.__version__],
        "candidates": CANDIDATES,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _read(file: Path, stage: str, key: str) -> list[str] | None:
    """Returns the recorded choice of a stage, or None if there is none for this key."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))[stage]
        return [record["vision"], record["language"]] if record["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a damaged record costs only another search


def _write(file: Path, stage: str, key: str, choice: Choice) -> None:
    """Records the choice of a stage and keeps those of others."""
    try:
        records = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        records = {}
    trials = [_record(trial) for trial in choice.trials]
    records[stage] = {"key": key, **_record(choice), "trials": trials}
    with open_atomically(file) as stream:
        stream.write(json.dumps(records, indent=2) + "\n")


def _record(outcome: Choice | Trial) -> dict[str, Any]:
    """Returns the fields of a choice or a trial for JSON, with the candidate's fields among them."""
    fields = dataclasses.asdict(outcome)
    return {**fields.pop("remat")._asdict(), **fields}


def _is_local(device: jax.Device) -> bool:
    return device.process_index == jax.process_index()


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
