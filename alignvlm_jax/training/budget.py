"""Estimates how much disk space and device memory a run needs, before its first step."""

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from alignvlm_jax.checkpoints import staging
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.locations import is_bucket
from alignvlm_jax.training.train_step import abstract_state


def describe(config: ExperimentConfig, stages: Sequence[StageConfig], mesh: Mesh, workdir: Path) -> str:
    """Describes the needs of a run in two lines, with a warning if the disk is too small.

        checkpoints: at most 1.53 GiB each, 3 at a time: 4.59 GiB; runs/first has 80.20 GiB free
        memory of each device: weights 0.51 GiB, optimizer 1.02 GiB, gradients 0.51 GiB (stage "captions"); activations
        come on top

    Args:
      config: the experiment.
      stages: its stages, with their numbers of steps filled in.
      mesh: devices that it runs on.
      workdir: folder of the run.
    """
    # Size of the checkpoints on disk.
    states = [(stage, abstract_state(config.model, stage, mesh)) for stage in stages]
    checkpoint = max(_bytes((state.params, state.opt_state)) for _, state in states)
    number, remark = max_checkpoints_on_disk(config, sum(stage.steps for stage in stages))
    lines = [f"checkpoints: at most {_size(checkpoint)} each, {number} at a time{remark}: {_size(number * checkpoint)}"]
    free, held = math.inf, 0
    if not is_bucket(workdir):
        free = shutil.disk_usage(_existing(workdir)).free
        held = sum(path.stat().st_size for path in workdir.glob("checkpoints/**/*") if path.is_file())
        lines[0] += f"; {workdir} has {_size(free)} free" + (
            f", and holds {_size(held)} of them already" if held else ""
        )
    elif staging.is_staged(workdir):
        disk = staging.staging_root()
        staged = shutil.disk_usage(_existing(disk)).free
        lines[0] += f"; one at a time is staged in {disk}, which has {_size(staged)} free"
        if checkpoint > staged:
            lines.append(
                f"warning: the disk has less free space than that; name a larger one with {staging.STAGING_VARIABLE}"
            )
    if number * checkpoint > free + held:
        lines.append(
            "warning: the disk has less free space than that; use a smaller config.checkpoint.keep or another workdir "
            "(a save that fails leaves earlier checkpoints untouched)"
        )
    # Memory of the stage that needs the most. Weights are the same in all stages; the optimizer state and the gradients
    # grow with the trainable parts.
    stage, state = max(states, key=lambda item: _bytes_per_device(item[1].opt_state))
    trained = {part: state.params[part] for part in stage.trainable}
    lines.append(
        f"memory of each device: weights {_size(_bytes_per_device(state.params))}, optimizer "
        f"{_size(_bytes_per_device(state.opt_state))}, gradients {_size(_bytes_per_device(trained))} (stage "
        f'"{stage.name}"); activations come on top'
    )
    return os.linesep.join(lines)


def max_checkpoints_on_disk(config: ExperimentConfig, total_steps: int) -> tuple[int, str]:
    """Returns the largest number of checkpoints on disk at once, and a remark about the permanent ones."""
    rules = config.checkpoint
    permanent = total_steps // rules.keep_every if rules.keep_every else 0
    # One more for the checkpoint being written, because an older one is deleted only after it is complete.
    number = rules.keep + rules.keep_best + permanent + 1
    return number, f" ({permanent} of them permanently)" if permanent else ""


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _bytes_per_device(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 / 10 else f"{number / 2**20:.1f} MiB"


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
