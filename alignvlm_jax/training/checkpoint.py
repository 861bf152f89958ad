"""All of Orbax: what a run leaves on disk, and how it is read again.

    WORKDIR/config.json              the experiment
    WORKDIR/history.json             where its first weights came from, if not from the backbones the config names
    WORKDIR/tokenizer/               its tokenizer and chat template
    WORKDIR/checkpoints/120/         everything after 120 optimizer steps, counted over all stages:
        params/  opt_state/  meta/   weights; the stage's optimizer; `Progress`, where the data were, config, versions
        digests.0-of-1.json          of each file its size and digest; without them the step does not count

So a workdir needs nothing but itself to be resumed, asked or scored. Orbax writes in the background; once all files are
there their digests are added (`integrity.py`), and only then are older steps deleted (`retention.py`). Orbax itself
restores damaged files as other numbers without a word, so digests are checked before anything is restored. A workdir
that was imported rather than trained holds one step without an `opt_state`.

Weights are stored in chunks of at most `_CHUNK_BYTES`, stacked layers cut between layers first: whoever wants one layer
of an 8B model (`ParameterReader`) reads that layer, on whatever mesh it was saved.
"""

import dataclasses
import errno
import functools
import json
import os
import shutil
import sys
import threading
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
from tqdm import tqdm

from alignvlm_jax import config as configs
from alignvlm_jax.config import ExperimentConfig
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import Params, random_parameters, stored_dtypes
from alignvlm_jax.new_folder import new_folder
from alignvlm_jax.parallel import distributed, sharding
from alignvlm_jax.training import integrity, provenance
from alignvlm_jax.training.retention import kept_steps
from alignvlm_jax.training.step import TrainState

CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "tokenizer"
CHECKPOINTS_FOLDER = "checkpoints"
HISTORY_FILE = "history.json"
_CHUNK_BYTES = 128 * 2**20
_MAX_FAILURES = 3
_STORAGE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOENT,
)


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
    """Saves and restores the states of one run. Use it as a context: leaving it waits for what is being written.

    With several processes all make the same calls. A save that fails (a full disk, a folder that cannot be written)
    is said at once and leaves the steps before it as they are. A run of one process goes on, to try again with its
    next checkpoint; after `_MAX_FAILURES` in a row it ends, as does one of several processes at once: Orbax has them
    wait for each other.
    """

    def __init__(self, workdir: Path, config: ExperimentConfig):
        self._config = config
        self._folder = (workdir / CHECKPOINTS_FOLDER).absolute()
        self._orbax = _make_orbax()
        self._completing: threading.Thread | None = None
        self._failure: tuple[Path, Exception] | None = None
        self._failures = 0
        self._newest: int | None = None  # the step last saved, or known to be undamaged
        self._cleaned_up = False

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            if kind is None:
                self.wait()
            elif self._completing:
                self._completing.join()
        finally:
            self._orbax.close()

    def save(
        self,
        progress: Progress,
        state: TrainState,
        data: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves in the background; a step that is saved already is left as it is.

        Args:
          progress: where the run stands.
          state: weights and optimizer.
          data: where the data stand, as JSON can hold it; `data_state` gives it back.
          metrics: what the run has come to, for `checkpoint.keep_best`.

        Raises:
          UserError: saving failed, and failed before.
        """
        items = {"params": _save_in_chunks(state.params), "opt_state": _save_in_chunks(state.opt_state)}
        self._save(progress, items, {"data": data, "metrics": dict(metrics or {})})

    def save_params(self, progress: Progress, params: Params) -> None:
        """Saves weights alone, as the start of a stage: its optimizer is made when training begins."""
        self._save(progress, {"params": _save_in_chunks(params)}, {})

    def wait(self) -> None:
        """Until everything is on disk.

        Raises:
          UserError: what was saved last did not get there.
        """
        self._join(failures_allowed=0)

    def latest(self) -> Progress | None:
        """The progress of the newest undamaged checkpoint, None if there is none. Those passed over are named."""
        self._join()
        for step in reversed(distributed.gather_json(_numbered(self._folder))[0]):
            path = self._folder / str(step)
            if step != self._newest:
                share = (jax.process_index(), jax.process_count())
                found = distributed.gather_json(integrity.damage(path, share=share))
                if reason := next(filter(None, found), None):
                    _say(f"warning: {path} is passed over: {reason}")
                    continue
                self._newest = step
            return Progress(**read_meta(path)["progress"])
        return None

    def data_state(self, progress: Progress) -> dict[str, Any] | None:
        """What was saved of the data at `progress`, if anything was."""
        return read_meta(self._folder / str(progress.step)).get("data")

    def has_optimizer(self, progress: Progress) -> bool:
        """Whether the checkpoint at `progress` can be gone on from in the middle of its stage."""
        return (self._folder / str(progress.step) / "opt_state").is_dir()

    def restore(self, progress: Progress, abstract: TrainState) -> TrainState:
        """The state at `progress`, with the shapes and shardings of `abstract`, on whatever mesh those are."""
        restored = self._restore(progress, params=abstract.params, opt_state=abstract.opt_state)
        step = jax.device_put(np.int32(progress.step_in_stage), abstract.step.sharding)
        return TrainState(step, restored.params, restored.opt_state)

    def restore_params(self, progress: Progress, abstract: Params) -> Params:
        """The weights alone: what the next stage starts from."""
        return self._restore(progress, params=abstract).params

    def _restore(self, progress: Progress, **abstract: Any) -> Any:
        args = ocp.args.Composite(**{name: _restore_into(item) for name, item in abstract.items()})
        return self._orbax.restore(self._folder / str(progress.step), args=args)

    def _save(self, progress: Progress, items: dict[str, Any], more: dict[str, Any]) -> None:
        self._join()
        if progress.step == self._newest:
            return
        self._failure = None
        step = self._folder / str(progress.step)
        meta = ocp.args.JsonSave({**_meta(self._config, progress), **more})
        try:
            if distributed.is_primary():
                self._clean_up()
                integrity.remove(step)  # damaged, or of a past that was given up
            self._orbax.save(step, args=ocp.args.Composite(**items, meta=meta))
        except Exception as error:
            self._fail(step, error)
            return self._join()
        self._completing = threading.Thread(target=self._complete, args=(step,), name="checkpoint")
        self._completing.start()

    def _complete(self, step: Path) -> None:
        """In the background: once Orbax is done, makes the step complete and deletes those that are not to stay."""
        try:
            self._orbax.wait_until_finished()
            integrity.seal(step, jax.process_index(), jax.process_count())
            if distributed.is_primary():
                integrity.wait_for_seals(step, jax.process_count())
                self._delete_old(int(step.name))
            self._newest, self._failures = int(step.name), 0
        except Exception as error:
            self._fail(step, error)

    def _fail(self, step: Path, error: Exception) -> None:
        self._failure = step, error
        self._failures += 1
        if _is_of_storage(error):
            # Orbax keeps errors of its threads, and would raise this one again with the next save.
            self._orbax = _make_orbax()
            if jax.process_count() == 1:  # else others are writing into it, and the next start clears it away
                integrity.remove(step)
                shutil.rmtree(f"{step}.orbax-checkpoint-tmp", ignore_errors=True)
            _say(f"warning: {self._describe(step, error)}")

    def _join(self, failures_allowed: int | None = None) -> None:
        """Waits for the save under way, and raises what went wrong if that is more than is allowed."""
        if self._completing:
            self._completing.join()
            self._completing = None
        if self._failure is None:
            return
        step, error = self._failure
        if not _is_of_storage(error):
            raise error
        if failures_allowed is None:
            failures_allowed = _MAX_FAILURES - 1 if jax.process_count() == 1 else 0
        if self._failures > failures_allowed:
            raise UserError(self._describe(step, error)) from error

    def _describe(self, step: Path, error: Exception) -> str:
        good = [complete for complete in complete_steps(self._folder) if complete != int(step.name)]
        left = f"the newest checkpoint is {self._folder / str(good[-1])}" if good else "there is no other"
        return f"step {step.name} could not be saved in {step}: {_system_words(error) or error}; {left}"

    def _clean_up(self) -> None:
        """Removes, once, what an earlier sitting was writing when it was killed."""
        if not self._cleaned_up:
            for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
            self._cleaned_up = True

    def _delete_old(self, newest: int) -> None:
        """Deletes what the rules do not keep, and what is later than the newest: its past was given up."""
        complete = [step for step in complete_steps(self._folder) if step <= newest]
        metrics = {step: read_meta(self._folder / str(step)).get("metrics") or {} for step in complete}
        kept = kept_steps(metrics, self._config.checkpoint)
        for step in _numbered(self._folder):
            if step not in kept:
                integrity.remove(self._folder / str(step))


def _make_orbax() -> ocp.AsyncCheckpointer:
    # Folders made in the background would have its threads wait for one that cannot be made.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)


def read_meta(step: Path) -> dict[str, Any]:
    """What was saved of a step besides weights: progress, where the data were, metrics, config, versions."""
    return json.loads((step / "meta" / "metadata").read_text(encoding="utf-8"))


def complete_steps(checkpoints: Path) -> list[int]:
    """The steps in a folder of checkpoints of which every file is there, oldest first."""
    return [step for step in _numbered(checkpoints) if integrity.incompleteness(checkpoints / str(step)) is None]


def _numbered(checkpoints: Path) -> list[int]:
    return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())


def _meta(config: ExperimentConfig, progress: Progress) -> dict[str, Any]:
    return {
        "progress": dataclasses.asdict(progress),
        "config": configs.to_dict(config),
        "versions": provenance.versions(),
    }


def _is_of_storage(error: Exception) -> bool:
    """Whether it is the disk's fault; anything else is a mistake here and must show itself."""
    return isinstance(error, OSError) or _system_words(error) is not None


def _system_words(error: Exception) -> str | None:
    """What the system said. tensorstore reports the disk's troubles as a ValueError with that in it."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return next((words for number in _STORAGE_ERRORS if (words := os.strerror(number)) in str(error)), None)


def _say(text: str) -> None:
    """Above a progress bar, once for all processes."""
    if distributed.is_primary():
        tqdm.write(text, file=sys.stderr)


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
    with new_folder(workdir) as scratch:
        (scratch / CONFIG_FILE).write_text(configs.to_json(config), encoding="utf-8")
        write_history(scratch, history)
        tokenizer.save(scratch / TOKENIZER_FOLDER)
        with Checkpointer(scratch, config) as checkpointer:
            checkpointer.save_params(progress or Progress(), params)


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
        steps = complete_steps(workdir / CHECKPOINTS_FOLDER)
    if not (workdir / CONFIG_FILE).is_file():
        raise UserError(f"{folder} is not a checkpoint: {workdir} holds no {CONFIG_FILE} as a training run leaves it")
    if not steps:
        found = (path.parent.name for path in (workdir / CHECKPOINTS_FOLDER).glob("*/params"))
        begun = [int(name) for name in found if name.isdigit()]
        if begun:
            reason = integrity.incompleteness(workdir / CHECKPOINTS_FOLDER / str(max(begun)))
            raise UserError(f"{folder}: no checkpoint in it is whole; of step {max(begun)}: {reason}")
        raise UserError(f"{folder} holds no finished checkpoint yet: the run in {workdir} was stopped before its first")
    if reason := integrity.incompleteness(workdir / CHECKPOINTS_FOLDER / str(max(steps))):
        raise UserError(f"{folder} is no complete checkpoint: {reason}")
    return workdir, max(steps)


def find_undamaged(folder: str | Path) -> tuple[Path, int]:
    """As `find_checkpoint`, but with all weights read and compared with their digests, once for each process.

    In a workdir, a damaged step is named and the newest that is not is taken.

    Raises:
      UserError: there is none.
    """
    workdir, newest = find_checkpoint(folder)
    checkpoints, reasons = workdir / CHECKPOINTS_FOLDER, []
    candidates = [newest] if Path(folder).name.isdigit() else reversed(complete_steps(checkpoints))
    for step in candidates:
        sealed = max(path.stat().st_mtime_ns for path in (checkpoints / str(step)).glob("digests.*.json"))
        if not (reason := _damage_of_weights(checkpoints / str(step), sealed)):
            return workdir, step
        reasons.append(f"{checkpoints / str(step)}: {reason}")
        _say(f"warning: {checkpoints / str(step)} is passed over: {reason}")
    raise UserError(f"{folder} holds no checkpoint that is undamaged: {'; '.join(reasons)}")


@functools.lru_cache(maxsize=64)
def _damage_of_weights(step: Path, sealed: int) -> str | None:
    del sealed  # when it was; here to tell it from another of the same name
    return integrity.damage(step, ("params", "meta"))


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
        jax.tree.map(
            lambda leaf, dtype, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
            shapes,
            stored_dtypes(shapes, dtype),
            where,
        ),
    )


def restore_params_into(folder: str | Path, abstract: Params) -> Params:
    """A checkpoint's weights without its optimizer, with the shapes, dtypes and shardings of `abstract`."""
    workdir, step = find_undamaged(folder)
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
        workdir, self.step = find_undamaged(folder)
        self.config = load_config(folder)
        self.history = read_history(folder)
        self.tokenizer_folder = workdir / TOKENIZER_FOLDER
        self._folder = (workdir / CHECKPOINTS_FOLDER / str(self.step)).absolute()
        try:
            self.meta = read_meta(self._folder)
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
