"""Training loop of the nano backbones: resumable, for one small model and one loss, without a mesh.

`training/` trains AlignVLM. This loop trains the nano backbones that it starts from.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from alignvlm_jax.config.optimizer import OptimizerConfig
from alignvlm_jax.progress import progress_bar
from alignvlm_jax.training.optimizer import make_optimizer, make_schedule


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Settings of the pre-training of a backbone.

    Attributes:
      steps: optimizer steps.
      batch_size: pages per step.
      learning_rate: peak rate; Muon trains the matrices, Adam the rest.
      warmup_steps: steps of linear warm-up; a cosine decay to 2 % of the peak follows.
      weight_decay: weight decay, scaled by the learning rate.
      seed: seed of the drawn pages and of the initial weights.
      save_every: number of steps between checkpoints.
      validation_pages: number of pages that the trained model is scored on.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    seed: int = 7
    save_every: int = 200
    validation_pages: int = 256


def pretrain(
    name: str,
    config: PretrainConfig,
    params: dict[str, Any],
    loss_fn: Callable[[dict[str, Any], dict[str, np.ndarray]], tuple[jax.Array, dict[str, jax.Array]]],
    batches: grain.MapDataset,
    workdir: str | Path,
) -> dict[str, Any]:
    """Trains `params` and returns them. Calling it again resumes from the last checkpoint in `workdir`.

    Args:
      name: label of the progress bar.
      config: settings.
      params: initial parameters; the top level names the parts, as `make_optimizer` requires.
      loss_fn: `(params, batch) -> (loss, metrics)`.
      batches: element i is the batch of step i.
      workdir: folder for checkpoints.
    """
    # The state: parameters, and the optimizer's moments.
    schedule = make_schedule(
        config.learning_rate, steps=config.steps, warmup_steps=config.warmup_steps, final_fraction=0.02
    )
    optimizer_config = OptimizerConfig(name="muon", weight_decay=config.weight_decay)
    optimizer = make_optimizer(optimizer_config, {part: schedule for part in params})
    state = {"params": params, "opt_state": optimizer.init(params)}
    manager = ocp.CheckpointManager(
        Path(workdir).absolute() / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    # Resume from the last checkpoint. Batches are a function of the step, so the data needs no state.
    first = manager.latest_step() or 0
    if first:
        state = manager.restore(first, args=ocp.args.StandardRestore(state))

    @functools.partial(jax.jit, donate_argnums=0)
    def step_fn(state, batch):
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"], batch)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, {
            "loss": loss
        } | metrics

    # Draw the remaining batches in the background while the model trains.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    data = iter(batches.slice(slice(first, config.steps)).to_iter_dataset(options))
    start_time = time.time()
    with progress_bar(desc=name, total=config.steps, initial=first, unit="step", mininterval=10) as bar:
        for step in range(first + 1, config.steps + 1):
            state, metrics = step_fn(state, next(data))
            bar.update()
            if step % 50 == 0:
                shown = {key: round(float(value), 4) for key, value in metrics.items()}
                bar.write(f"{name} step {step} at {time.time() - start_time:.0f} s: {shown}")
            if step % config.save_every == 0 or step == config.steps:
                manager.save(step, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
    return state["params"]
