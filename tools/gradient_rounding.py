"""Trains the nano model with the gradients of 8 simulated devices, exchanged in float32 and in bfloat16.

    python tools/gradient_rounding.py --steps 300 --seeds 0 1 --out rounding.jsonl

A CPU exchanges bfloat16 as float32. Here, one CPU therefore computes the gradients of the devices one after the other.
It rounds each to bfloat16, and their sum after each addition, as in a ring of chips. All gradients are rounded, also
those of norms and biases, which training exchanges in float32. A device has one bin with one page. Each line of the
output has a step's losses by seed and dtype.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import optax

from alignvlm_jax.config import load_config
from alignvlm_jax.demo.corpus import CORPUS, draw_corpus
from alignvlm_jax.locations import local_path
from alignvlm_jax.models.alignvlm import AlignVLM
from alignvlm_jax.reproduce.validation import OnePagePerBin
from alignvlm_jax.training.initial import initial_parameters
from alignvlm_jax.training.optimizer import make_optimizer
from alignvlm_jax.training.stages import stage_schedules
from alignvlm_jax.training.train_step import FIELDS, create_state

DTYPES = ("float32", "bfloat16")
NUM_DEVICES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--pages", type=int, default=5000, help="number of training pages to draw")
    parser.add_argument(
        "--data", type=local_path, default="runs/gradient_rounding", metavar="DIR", help="folder for the pages"
    )
    parser.add_argument("--out", type=local_path, required=True, metavar="FILE", help="JSON lines to write")
    args = parser.parse_args()
    draw_corpus(Path(args.data) / CORPUS, {"train": args.pages, "validation": 300, "heldout": 300})
    curves = {seed: losses(args, seed) for seed in args.seeds}
    with open(args.out, "w", encoding="utf-8") as file:
        for number in range(args.steps):
            line = {"step": number + 1} | {f"seed {seed}": next(curve) for seed, curve in curves.items()}
            print(json.dumps(line), file=file, flush=True)


def losses(args: argparse.Namespace, seed: int):
    """Yields the loss of each step with every dtype. Both runs have the same initial weights and the same batches."""
    # The nano model's first stage, in which all parts are trained.
    packing = ["tokens_per_bin=288", "tiles_per_bin=2", "examples_per_bin=1", f"bins_per_microbatch={NUM_DEVICES}"]
    overrides = [f"seed={seed}", f"data.root={args.data}", *(f"data.packing.{item}" for item in packing)]
    config = load_config("configs/nano.py", overrides)
    stage = dataclasses.replace(config.stages[0], steps=args.steps, global_batch=NUM_DEVICES, bins_per_step=NUM_DEVICES)
    config = dataclasses.replace(config, stages=(stage,))
    data = OnePagePerBin(config)
    params = initial_parameters(config)
    states = {dtype: jax.tree.map(jnp.array, create_state(stage, params)) for dtype in DTYPES}
    steps = {dtype: make_step(config.model, stage, dtype) for dtype in DTYPES}
    for batch in data.batches(0, stage, data.plan(0, stage), None, range(NUM_DEVICES)):
        rows = {name: batch[name].swapaxes(0, 1) for name in FIELDS}
        measured = {}
        for dtype in DTYPES:
            states[dtype], measured[dtype] = steps[dtype](states[dtype], rows)
        yield {dtype: float(loss) for dtype, loss in measured.items()}


def make_step(model_config, stage, dtype: str):
    """Returns a training step of a batch with one row for each device."""
    model = AlignVLM(model_config)
    # `reduce_precision` really rounds. XLA may omit a conversion to bfloat16 and back.
    mantissa_bits = {"float32": 23, "bfloat16": 7}[dtype]
    rounded = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=mantissa_bits)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        def summed_loss(params, row):
            output = model.apply({"params": params}, row, method="loss")
            return output.loss, (output.loss, output.weight)

        def add_device(total, row):
            gradients, sums = jax.grad(summed_loss, has_aux=True)(state.params, row)
            return jax.tree.map(lambda total, part: rounded(total + rounded(part)), total, gradients), sums

        gradients, sums = jax.lax.scan(add_device, jax.tree.map(jnp.zeros_like, state.params), batch)
        loss, weight = map(jnp.sum, sums)
        gradients = jax.tree.map(lambda gradient: gradient / weight, gradients)
        optimizer = make_optimizer(stage.optimizer, stage_schedules(stage, state.learning_rates))
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), loss / weight

    return step


if __name__ == "__main__":
    main()
