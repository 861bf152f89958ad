"""All of Orbax: what a run leaves on disk, and how it is read again.

    WORKDIR/config.json              the experiment
    WORKDIR/tokenizer/               its tokenizer and chat template
    WORKDIR/checkpoints/120/         everything after 120 optimizer steps, counted over all stages:
        params/  opt_state/  meta/   weights; the stage's optimizer; `Progress`, config and library versions

So a workdir needs nothing but itself to be resumed, asked or scored. Orbax writes in the background and gives a folder
its final name once all of it is there: a step that exists is complete.
"""

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding

from alignvlm_jax import config as configs
from alignvlm_jax.config import ExperimentConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import Params, random_parameters
from alignvlm_jax.parallel import sharding
from alignvlm_jax.training.step import TrainState

CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "tokenizer"
CHECKPOINTS_FOLDER = "checkpoints"
_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
      step: optimizer steps done, over all stages; names the checkpoint.
      stage: index of the stage the state belongs to.
      step_in_stage: steps done in it, and so the index of its next global batch: the position in the data.
      train_seconds: time spent in training so far, over all sittings.
    """

    step: int = 0
    stage: int = 0
    step_in_stage: int = 0
    train_seconds: float = 0.0


class Checkpointer:
    """Saves and restores the states of one run. Use it as a context: leaving it waits for what is being written."""

    def __init__(self, workdir: Path, config: ExperimentConfig):
        self._config = config
        self._manager = ocp.CheckpointManager(
            (workdir / CHECKPOINTS_FOLDER).absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.checkpoint.keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
            ),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def save(self, progress: Progress, state: TrainState) -> None:
        """Saves in the background; a step that is saved already is left as it is."""
        if progress.step in self._manager.all_steps():
            return
        meta = {
            "progress": dataclasses.asdict(progress),
            "config": configs.to_dict(self._config),
            "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        }
        self._manager.save(
            progress.step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(state.opt_state),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def wait(self) -> None:
        """Until everything is on disk."""
        self._manager.wait_until_finished()

    def latest(self) -> Progress | None:
        """The progress of the newest complete checkpoint, None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        return Progress(**meta["progress"])

    def restore(self, progress: Progress, abstract: TrainState) -> TrainState:
        """The state at `progress`, with the shapes and shardings of `abstract`, on whatever mesh those are."""
        restored = self._manager.restore(
            progress.step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                opt_state=ocp.args.StandardRestore(abstract.opt_state),
            ),
        )
        step = jax.device_put(jax.numpy.int32(progress.step_in_stage), abstract.step.sharding)
        return TrainState(step, restored.params, restored.opt_state)

    def restore_params(self, progress: Progress, abstract: Params) -> Params:
        """The weights alone: what the next stage starts from."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        return self._manager.restore(progress.step, args=args).params


def is_checkpoint(folder: str | Path) -> bool:
    """Whether `find_checkpoint` would find something."""
    try:
        find_checkpoint(folder)
    except UserError:
        return False
    return True


def find_checkpoint(folder: str | Path) -> tuple[Path, int]:
    """The workdir and the step that `folder` stands for: a workdir (its newest step) or one of its step folders."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a checkpoint is the workdir of a training run")
    if folder.parent.name == CHECKPOINTS_FOLDER and folder.name.isdigit():
        workdir, steps = folder.parent.parent, [int(folder.name)]
    else:
        workdir = folder.parent if folder.name == CHECKPOINTS_FOLDER else folder
        found = (workdir / CHECKPOINTS_FOLDER).glob("*/params")
        steps = [int(path.parent.name) for path in found if path.parent.name.isdigit()]
    if not (workdir / CONFIG_FILE).is_file():
        raise UserError(f"{folder} is not a checkpoint: {workdir} holds no {CONFIG_FILE} as a training run leaves it")
    if not steps or not (workdir / CHECKPOINTS_FOLDER / str(max(steps)) / "params").is_dir():
        raise UserError(f"{folder} holds no finished checkpoint yet: the run in {workdir} was stopped before its first")
    return workdir, max(steps)


def load_config(folder: str | Path) -> ExperimentConfig:
    """The experiment that a checkpoint belongs to."""
    return configs.from_dict(configs.read_json(find_checkpoint(folder)[0] / CONFIG_FILE))


def restore_params(folder: str | Path, mesh: Mesh | None = None) -> Params:
    """A checkpoint's weights, float32, for inference: on a mesh, or whole on the first device."""
    workdir, step = find_checkpoint(folder)
    boxed = jax.eval_shape(lambda: random_parameters(load_config(folder).model, jax.random.key(0)))
    shapes = nn.unbox(boxed)
    if mesh is None:
        where = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        where = sharding.parameter_shardings(boxed, mesh)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, where
    )
    path = (workdir / CHECKPOINTS_FOLDER / str(step) / "params").absolute()
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            return reader.restore(path, args=ocp.args.StandardRestore(abstract))
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
