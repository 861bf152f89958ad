"""Trains the nano model on 8 simulated devices, with gradients that devices exchange in float32 and in bfloat16.

    python tools/gradient_rounding.py --steps 300 --seeds 0 1 --data runs/demo/data --out rounding.jsonl

A CPU exchanges bfloat16 as float32. Here, each device therefore rounds the gradient of its own rows to bfloat16 itself,
and the sum over devices is rounded after each addition, as in a ring of chips. All gradients are rounded, also those of
norms and biases, which training exchanges in float32. Each line of the output has a step's losses by seed and dtype.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import optax

from alignvlm_jax.config.loading import load_config
from alignvlm_jax.demo.corpus import CORPUS, draw_corpus
from alignvlm_jax.models.alignvlm import AlignVLM
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import make_mesh
from alignvlm_jax.training.experiment_data import ExperimentData
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
    parser.add_argument("--pages", type=int, default=24_000, help="number of training pages (default: the demo's)")
    parser.add_argument("--data", default="runs/demo/data", metavar="DIR", help="folder for the demo's documents")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines to write")
    args = parser.parse_args()
    draw_corpus(Path(args.data) / CORPUS, {"train": args.pages, "validation": 300, "heldout": 300})
    curves = {seed: losses(args, seed) for seed in args.seeds}
    with open(args.out, "w", encoding="utf-8") as file:
        for number in range(args.steps):
            line = {"step": number + 1} | {f"seed {seed}": next(curve) for seed, curve in curves.items()}
            print(json.dumps(line), file=file, flush=True)


def losses(args: argparse.Namespace, seed: int):
    """Yields the loss of each step with every dtype. Both runs have the same initial weights and the same batches."""
    # The nano model's first stage, with a bin for each device.
    overrides = [f"seed={seed}", f"data.root={args.data}", f"data.packing.bins_per_microbatch={NUM_DEVICES}"]
    config = load_config("configs/nano.py", [*overrides, "data.workers=0"])
    stage = dataclasses.replace(
        config.stages[0], steps=args.steps, global_batch=2 * NUM_DEVICES, trainable=("vision", "connector", "language")
    )
    stage = dataclasses.replace(stage, bins_per_step=NUM_DEVICES)
    config = dataclasses.replace(config, stages=(stage,))
    mesh, data = make_mesh(config.mesh), ExperimentData(config)
    params = initial_parameters(config, mesh)
    states = {dtype: jax.tree.map(jnp.array, create_state(stage, params)) for dtype in DTYPES}
    steps = {dtype: make_step(config.model, stage, mesh, dtype) for dtype in DTYPES}
    for batch in data.batches(0, stage, data.plan(0, stage), None, range(NUM_DEVICES)):
        placed = sharding.shard_rows({name: batch[name][0] for name in FIELDS}, mesh)
        measured = {}
        for dtype in DTYPES:
            states[dtype], measured[dtype] = steps[dtype](states[dtype], placed)
        yield {dtype: float(loss) for dtype, loss in measured.items()}


def make_step(model_config, stage, mesh, dtype: str):
    """Returns a training step of weights that are complete on every device."""
    model = AlignVLM(model_config)

    def local(params, batch):
        def summed_loss(params):
            output = model.apply({"params": params}, batch, method="loss")
            return output.loss, output.weight

        (loss, weight), gradients = jax.value_and_grad(summed_loss, has_aux=True)(params)
        return *jax.lax.psum((loss, weight), "data"), jax.tree.map(exchange, gradients)

    def exchange(gradient):
        if dtype == "float32":
            return jax.lax.psum(gradient, "data")
        # `reduce_precision` really rounds. XLA may omit a conversion to bfloat16 and back.
        rounded = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
        parts = jax.lax.all_gather(rounded(gradient), "data")
        return functools.reduce(lambda total, part: rounded(total + part), list(parts))

    rows = jax.P(("data", "fsdp"))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(jax.P(), rows), out_specs=jax.P(), check_vma=False)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        loss, weight, gradients = sharded(state.params, batch)
        gradients = jax.tree.map(lambda gradient: gradient / weight, gradients)
        optimizer = make_optimizer(stage.optimizer, stage_schedules(stage, state.learning_rates))
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), loss / weight

    return step


if __name__ == "__main__":
    main()
