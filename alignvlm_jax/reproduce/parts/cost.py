"""Cost of each connector: parameters, seconds per step and per answer, memory. Measured with no other job running."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.data import images
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.models.alignvlm import PARTS, Params
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import make_mesh
from alignvlm_jax.reproduce import recipe
from alignvlm_jax.reproduce.jobs import Job
from alignvlm_jax.reproduce.options import TITLES, Options
from alignvlm_jax.reproduce.part import Part, Results
from alignvlm_jax.reproduce.validation import OnePagePerBin
from alignvlm_jax.reproduce.work import Work
from alignvlm_jax.training.initial import initial_parameters, load_tokenizer
from alignvlm_jax.training.train_step import FIELDS, jit_train_step, place_state

_STEPS = 12
_QUESTIONS = 64
_ROUNDS = 3
# Every answer has this many tokens. An untrained model does not end its answers, so all connectors do the same work.
_NEW_TOKENS = 16


def jobs(options: Options) -> list[Job]:
    """Returns one job per connector. The encoder's weights and the seed do not affect the cost."""
    encoder = options.encoders[-1]
    return [Job("cost", encoder, name, weight=0.2, runs_alone=True) for name in recipe.connectors(options)]


def run(work: Work) -> dict[str, Any]:
    """Measures training steps and answers on fresh models."""
    config = work.experiment()
    mesh, stage = make_mesh(config.mesh), config.stages[-1]
    params = initial_parameters(config, mesh)
    count = {part: int(sum(leaf.size for leaf in jax.tree.leaves(params[part]))) for part in PARTS}
    reader = Reader(config.model, jax.tree.map(np.asarray, params), load_tokenizer(config), config.data.tiling)
    with jax.set_mesh(mesh):
        seconds, temporary = _train(config, stage, mesh, params)
    return {
        "parameters": count,
        "visual_tokens_per_page": config.data.packing.tokens_per_bin - max(s.max_text_tokens for s in config.stages),
        "seconds_per_step": round(seconds, 4),
        "step_memory_mb": round(temporary / 2**20, 1),
        "answer_seconds": round(_answer(reader, work.records("heldout")), 3),
    }


def _train(config: ExperimentConfig, stage: StageConfig, mesh: jax.sharding.Mesh, params: Params) -> tuple[float, int]:
    """Returns the median seconds of a step, and the bytes that the compiled step needs besides the training state."""
    # Prepare the data and the state of the last stage.
    data = OnePagePerBin(config)
    plan = data.plan(len(config.stages) - 1, stage)
    rows = range(config.data.packing.bins_per_microbatch)
    state = place_state(config.model, stage, mesh, params)
    train_step = jit_train_step(config.model, stage, mesh, gradient_dtype=config.mesh.gradient_dtype)
    seconds = []
    batches = data.batches(len(config.stages) - 1, stage, plan, None, rows)
    try:
        for number, batch in zip(range(_STEPS), batches, strict=False):
            on_device = sharding.shard_batch({name: batch[name] for name in FIELDS}, mesh)
            if number == 0:
                compiled = train_step.lower(state, on_device).compile()
            # The step is timed without the transfer of its batch.
            jax.block_until_ready(on_device)
            start_time = time.monotonic()
            state, metrics = compiled(state, on_device)
            jax.block_until_ready(metrics)
            seconds.append(time.monotonic() - start_time)
    finally:
        batches.close()
    # The first step is slower than the others, and not counted.
    return statistics.median(seconds[1:]), compiled.memory_analysis().temp_size_in_bytes


def _answer(reader: Reader, records: Sequence[Any]) -> float:
    """Returns the seconds for a batch of questions: the best of a few rounds, after one round that compiles."""
    prompts = []
    # Records are read by index, because iterating past the end of a data set is reported as a damaged record.
    for index in range(min(_QUESTIONS, len(records))):
        record = records[index]
        prompts += reader.prompts(images.open_image(record["image"]), record["questions"][:1])
    times = []
    for _ in range(1 + _ROUNDS):
        start_time = time.monotonic()
        reader.answer(prompts, max_new_tokens=_NEW_TOKENS)
        times.append(time.monotonic() - start_time)
    return min(times[1:])


def section(results: Results, folder: Path) -> str:
    """Returns the section of the report."""
    complete = results.complete(jobs(results.options))
    rows = {job.connector: result["found"] for job, result in complete.items()}
    mlp = rows.get("mlp")
    lines = [
        "| connector | parameters of the connector | visual tokens per page | seconds per step | relative to MLP | "
        f"memory of a step | seconds for {_QUESTIONS} answers | relative to MLP |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    # Ratios need the run of MLP, which may be missing.
    for connector, found in rows.items():
        ratios = [found[key] / mlp[key] if mlp else None for key in ("seconds_per_step", "answer_seconds")]
        step_ratio, answer_ratio = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        lines.append(
            f"| {TITLES[connector]} | {found['parameters']['connector']:,} | {found['visual_tokens_per_page']} | "
            f"{found['seconds_per_step']:.3f} | {step_ratio} | {found['step_memory_mb']:.0f} MB | "
            f"{found['answer_seconds']:.2f} | {answer_ratio} |"
        )
    cores = {result["cores"] for result in complete.values()}
    introduction = (
        f"Measured on fresh models, one after the other, on {' or '.join(map(str, sorted(cores))) or '?'} CPU "
        "cores.\n\n"
        f"- *Seconds per step*: the median of {_STEPS - 1} steps of the last stage.\n"
        f"- *Seconds for answers*: the best of {_ROUNDS} rounds of {_QUESTIONS} questions, with {_NEW_TOKENS} tokens "
        "decoded for each.\n"
        "- *Memory of a step*: what the compiled step needs besides weights and optimizer."
    )
    return "\n".join([introduction, "", *lines, "", results.missing(jobs(results.options))])


def claims(results: Results) -> list[str]:
    """Returns the ratio of the answer times of ALIGN and MLP."""
    found = {job.connector: result["found"] for job, result in results.complete(jobs(results.options)).items()}
    if not {"align", "mlp"} <= found.keys():
        return []
    ratio = found["align"]["answer_seconds"] / found["mlp"]["answer_seconds"]
    return [
        f"Measured: ALIGN takes {ratio:.2f} times as long to answer as MLP (in the paper 2.5 % fewer tokens per "
        "second, with a vocabulary 250 times as large)."
    ]


PART = Part("cost", "Seconds and memory", jobs, run, section, claims)
