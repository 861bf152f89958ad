"""All of Orbax: what a run leaves on disk, and how it is read again.

    WORKDIR/config.json              the experiment
    WORKDIR/history.json             where its first weights came from, if not from the backbones the config names
    WORKDIR/tokenizer/               its tokenizer and chat template
    WORKDIR/checkpoints/120/         everything after 120 optimizer steps, counted over all stages:
        params/  opt_state/  meta/   weights; the stage's optimizer; `Progress`, where the data were, config, versions

So a workdir needs nothing but itself to be resumed, asked or scored. Orbax writes in the background and gives a folder
its final name once all of it is there: a step that exists is complete. A workdir that was imported rather than trained
holds one step without an `opt_state`.

Weights are stored in chunks of at most `_CHUNK_BYTES`, stacked layers cut between layers first: whoever wants one layer
of an 8B model (`ParameterReader`) reads that layer, on whatever mesh it was saved.
"""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, SingleDeviceSharding

from alignvlm_jax import config as configs
from alignvlm_jax.config import ExperimentConfig
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import Params, random_parameters
from alignvlm_jax.new_folder import new_folder
from alignvlm_jax.parallel import sharding
from alignvlm_jax.training.step import TrainState

CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "tokenizer"
CHECKPOINTS_FOLDER = "checkpoints"
HISTORY_FILE = "history.json"
_CHUNK_BYTES = 128 * 2**20
_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
      step: optimizer steps done, over all stages; names the checkpoint.
      stage: index of the stage the state belongs to.
      step_in_stage: steps done in it.
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

    def save(self, progress: Progress, state: TrainState, data: Mapping[str, Any] | None = None) -> None:
        """Saves in the background; a step that is saved already is left as it is.

        Args:
          progress: where the run stands.
          state: weights and optimizer.
          data: where the data stand, as JSON can hold it; `data_state` gives it back.
        """
        if progress.step in self._manager.all_steps():
            return
        self._manager.save(
            progress.step,
            args=ocp.args.Composite(
                params=_save_in_chunks(state.params),
                opt_state=_save_in_chunks(state.opt_state),
                meta=ocp.args.JsonSave({**_meta(self._config, progress), "data": data}),
            ),
        )

    def save_params(self, progress: Progress, params: Params) -> None:
        """Saves weights alone, as the start of a stage: its optimizer is made when training begins."""
        args = ocp.args.Composite(params=_save_in_chunks(params), meta=ocp.args.JsonSave(_meta(self._config, progress)))
        self._manager.save(progress.step, args=args)

    def wait(self) -> None:
        """Until everything is on disk."""
        self._manager.wait_until_finished()

    def latest(self) -> Progress | None:
        """The progress of the newest complete checkpoint, None if there is none."""
        step = self._manager.latest_step()
        return None if step is None else Progress(**self._read_meta(step)["progress"])

    def data_state(self, progress: Progress) -> dict[str, Any] | None:
        """What was saved of the data at `progress`, if anything was."""
        return self._read_meta(progress.step).get("data")

    def has_optimizer(self, progress: Progress) -> bool:
        """Whether the checkpoint at `progress` can be gone on from in the middle of its stage."""
        return "opt_state" in self._manager.item_metadata(progress.step)

    def restore(self, progress: Progress, abstract: TrainState) -> TrainState:
        """The state at `progress`, with the shapes and shardings of `abstract`, on whatever mesh those are."""
        restored = self._manager.restore(
            progress.step,
            args=ocp.args.Composite(
                params=_restore_into(abstract.params),
                opt_state=_restore_into(abstract.opt_state),
            ),
        )
        step = jax.device_put(np.int32(progress.step_in_stage), abstract.step.sharding)
        return TrainState(step, restored.params, restored.opt_state)

    def restore_params(self, progress: Progress, abstract: Params) -> Params:
        """The weights alone: what the next stage starts from."""
        args = ocp.args.Composite(params=_restore_into(abstract))
        return self._manager.restore(progress.step, args=args).params

    def _read_meta(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta


def _meta(config: ExperimentConfig, progress: Progress) -> dict[str, Any]:
    return {
        "progress": dataclasses.asdict(progress),
        "config": configs.to_dict(config),
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def _save_in_chunks(tree: Any) -> ocp.args.PyTreeSave:
    def arguments(path, leaf):
        del leaf
        stacked = any(getattr(key, "key", None) == "layers" for key in path)
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if stacked else ())

    save_args = jax.tree_util.tree_map_with_path(arguments, tree)
    # What is written stays in memory until a file is full, 2 GB of it by default.
    return ocp.args.PyTreeSave(tree, save_args=save_args, ocdbt_target_data_file_size=2 * _CHUNK_BYTES)


def _restore_into(abstract: Any) -> ocp.args.PyTreeRestore:
    # StandardRestore does just this, but its manager then refuses to save by anything but StandardSave.
    return ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))


def write_checkpoint(
    workdir: str | Path,
    config: ExperimentConfig,
    params: Params,
    tokenizer: ChatTokenizer,
    *,
    history: Sequence[dict[str, Any]],
    progress: Progress | None = None,
) -> None:
    """Writes weights that were not trained here as a workdir that can be asked, trained from and exported.

    Everything is written beside `workdir` first and gets its name at the end: there is no half-written checkpoint.

    Args:
      workdir: must not exist, or be an empty folder.
      config: the experiment that goes on from here.
      params: weights, wherever they lie; stored in the dtypes they have.
      tokenizer: of the language model.
      history: what was done to the weights so far, oldest first; for the model card.
      progress: what the weights went through already.
    """
    try:
        with new_folder(workdir) as scratch:
            (scratch / CONFIG_FILE).write_text(configs.to_json(config), encoding="utf-8")
            write_history(scratch, history)
            tokenizer.save(scratch / TOKENIZER_FOLDER)
            with Checkpointer(scratch, config) as checkpointer:
                checkpointer.save_params(progress or Progress(), params)
    except ValueError as error:
        # tensorstore reports a full disk so; anything else is a mistake here and must show itself.
        if "No space left" not in str(error):
            raise
        raise UserError(f"{workdir}: cannot be written (no space left on the device)") from error


def write_history(workdir: Path, history: Sequence[dict[str, Any]]) -> None:
    """Writes down where a run's first weights came from."""
    (workdir / HISTORY_FILE).write_text(json.dumps(list(history), indent=2) + "\n", encoding="utf-8")


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """What `write_history` wrote into a checkpoint's workdir; nothing for a run that began with its backbones."""
    path = find_checkpoint(folder)[0] / HISTORY_FILE
    return configs.read_json(path) if path.is_file() else []


def history_of_run(folder: str | Path) -> list[dict[str, Any]]:
    """What was done to a checkpoint's weights, its own training included: the history of whatever starts from it."""
    reader = ParameterReader(folder)
    trained = {"what": "trained", "progress": reader.meta["progress"], "config": reader.meta["config"]}
    return [*reader.history, *([trained] if reader.step else [])]


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


def restore_params(folder: str | Path, mesh: Mesh | None = None, *, dtype: str = "float32") -> Params:
    """A checkpoint's weights without its optimizer, in `dtype`: on a mesh, or whole on the first device."""
    boxed = jax.eval_shape(lambda: random_parameters(load_config(folder).model, jax.random.key(0)))
    shapes = nn.unbox(boxed)
    if mesh is None:
        where = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        where = sharding.parameter_shardings(boxed, mesh)
    return restore_params_into(
        folder,
        jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place), shapes, where),
    )


def restore_params_into(folder: str | Path, abstract: Params) -> Params:
    """A checkpoint's weights without its optimizer, with the shapes, dtypes and shardings of `abstract`."""
    workdir, step = find_checkpoint(folder)
    path = (workdir / CHECKPOINTS_FOLDER / str(step) / "params").absolute()
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            return reader.restore(path, args=ocp.args.StandardRestore(abstract))
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


class ParameterReader:
    """A checkpoint's weights, whatever mesh saved them, a slice at a time on the host.

    Attributes:
      config, step, meta, history: what the workdir says of the checkpoint; `meta` has its progress and versions.
      tokenizer_folder: the run's tokenizer.
      shapes, dtypes: of every weight, by its path ("language/layers/mlp/gate/kernel").
    """

    def __init__(self, folder: str | Path):
        workdir, self.step = find_checkpoint(folder)
        self.config = load_config(folder)
        self.history = read_history(folder)
        self.tokenizer_folder = workdir / TOKENIZER_FOLDER
        self._folder = (workdir / CHECKPOINTS_FOLDER / str(self.step)).absolute()
        try:
            with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
                self.meta = reader.restore(self._folder / "meta", args=ocp.args.JsonRestore())
            # Asked directly: a `Checkpointer` looks for metadata of the whole step in here, and warns.
            tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(self._folder / "params")).tree
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"{self._folder} cannot be read: {str(error).splitlines()[0]}") from error
        leaves = {"/".join(path): leaf for path, leaf in flatten_dict(tree).items()}
        self.shapes: dict[str, tuple[int, ...]] = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        self.dtypes: dict[str, np.dtype] = {path: jnp.dtype(leaf.dtype) for path, leaf in leaves.items()}

    def read(self, path: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """One weight, or the part of it that `index` names; `read("language/layers/mlp/gate/kernel", (3,))`.

        Raises:
          UserError: its bytes cannot be read.
        """
        try:
            return self._open(path)[(*index, ...)].read().result()
        except ValueError as error:
            raise UserError(f"{self._folder / 'params'}: {path} cannot be read: {error}") from error

    def chunk_shape(self, path: str) -> tuple[int, ...]:
        """The pieces a weight is stored in: what has to be read at least."""
        return tuple(self._open(path).chunk_layout.read_chunk.shape)

    def _open(self, path: str) -> tensorstore.TensorStore:
        # Orbax's layout: an OCDBT store whose folders are zarr arrays, named by the weight's path with dots.
        base = {"driver": "file", "path": f"{self._folder / 'params'}/"}
        store = {"driver": "ocdbt", "base": base, "path": path.replace("/", ".")}
        return tensorstore.open({"driver": "zarr", "kvstore": store}, read=True, open=True).result()
