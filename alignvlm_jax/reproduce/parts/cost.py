"""What each connector costs: parameters, seconds a step, answers a second, memory. Measured with nothing beside it."""

import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alignvlm_jax.data import images
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.models.alignvlm import PARTS
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import make_mesh
from alignvlm_jax.reproduce import recipe
from alignvlm_jax.reproduce.jobs import Job
from alignvlm_jax.reproduce.options import TITLES, Options
from alignvlm_jax.reproduce.part import Part, Results
from alignvlm_jax.reproduce.validation import OnePageABin
from alignvlm_jax.reproduce.work import Work
from alignvlm_jax.training.initial import initial_parameters, load_tokenizer
from alignvlm_jax.training.train_step import FIELDS, jit_train_step, place_state

_STEPS = 12
_QUESTIONS = 64
_ROUNDS = 3
_NEW_TOKENS = 16  # decoded by every row: an untrained model's answers do not end, so all connectors decode as much


def jobs(options: Options) -> list[Job]:
    """Once: the encoder's weights and the seed do not matter to it."""
    encoder = options.encoders[-1]
    return [Job("cost", encoder, name, weight=0.2, runs_alone=True) for name in recipe.connectors(options)]


def run(work: Work) -> dict[str, Any]:
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


def _train(config, stage, mesh, params) -> tuple[float, int]:
    """The median second of a step, and the bytes that a step needs beside weights and optimizer, as compiled."""
    data = OnePageABin(config)
    plan = data.plan(len(config.stages) - 1, stage)
    rows = range(config.data.packing.bins_per_microbatch)
    state = place_state(config.model, stage, mesh, params)
    train_step, seconds = jit_train_step(config.model, stage, mesh), []
    batches = data.batches(len(config.stages) - 1, stage, plan, None, rows)
    try:
        for number, batch in zip(range(_STEPS), batches, strict=False):
            on_device = sharding.shard_batch({name: batch[name] for name in FIELDS}, mesh)
            if number == 0:
                compiled = train_step.lower(state, on_device).compile()
            jax.block_until_ready(on_device)
            began = time.monotonic()
            state, measured = compiled(state, on_device)
            jax.block_until_ready(measured)
            seconds.append(time.monotonic() - began)
    finally:
        batches.close()
    return statistics.median(seconds[1:]), compiled.memory_analysis().temp_size_in_bytes


def _answer(reader: Reader, records) -> float:
    """Seconds for a batch of questions, the best of a few rounds; what is compiled in the first is not counted."""
    prompts = []
    for record in records:
        prompts += reader.prompts(images.open_image(record["image"]), record["questions"][:1])
        if len(prompts) == _QUESTIONS:
            break
    times = []
    for _ in range(1 + _ROUNDS):
        began = time.monotonic()
        reader.answer(prompts, max_new_tokens=_NEW_TOKENS)
        times.append(time.monotonic() - began)
    return min(times[1:])


def section(results: Results, folder: Path) -> str:
    rows = {job.connector: result["found"] for job, result in results.complete(jobs(results.options)).items()}
    base = rows.get("mlp")
    lines = [
        "| connector | parameters of the connector | visual tokens a page | seconds a step | of MLP's | memory of a "
        f"step | seconds for {_QUESTIONS} answers | of MLP's |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for connector, found in rows.items():
        ratios = [found[key] / base[key] if base else None for key in ("seconds_per_step", "answer_seconds")]
        of_step, of_answers = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        lines.append(
            f"| {TITLES[connector]} | {found['parameters']['connector']:,} | {found['visual_tokens_per_page']} | "
            f"{found['seconds_per_step']:.3f} | {of_step} | {found['step_memory_mb']:.0f} MB | "
            f"{found['answer_seconds']:.2f} | {of_answers} |"
        )
    cores = {result["cores"] for result in results.complete(jobs(results.options)).values()}
    what = (
        f"Measured one after the other on {' or '.join(map(str, sorted(cores))) or '?'} CPU cores: the median of "
        f"{_STEPS - 1} steps of the last stage, and the best of {_ROUNDS} rounds of {_QUESTIONS} questions with "
        f"{_NEW_TOKENS} tokens each decoded, on fresh models. The memory is what the compiled step needs "
        "beside weights and optimizer."
    )
    return "\n".join([what, "", *lines, "", results.missing(jobs(results.options))])


def claims(results: Results) -> list[str]:
    found = {job.connector: result["found"] for job, result in results.complete(jobs(results.options)).items()}
    if not {"align", "mlp"} <= found.keys():
        return []
    ratio = found["align"]["answer_seconds"] / found["mlp"]["answer_seconds"]
    return [
        f"Measured: answering takes ALIGN {ratio:.2f} times as long as MLP (the paper: 2.5 % fewer tokens a second, at "
        "a vocabulary 250 times as large)."
    ]


PART = Part("cost", "Seconds and memory", jobs, run, section, claims)
