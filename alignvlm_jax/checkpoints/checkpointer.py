"""A run's checkpoints while it goes on: saved in the background, found, and restored on whatever mesh there is now.

Once all files of a step are there their digests are added (`integrity.py`), and only then are older steps deleted
(`retention.py`). Files may be damaged without a word, so digests are checked before anything is restored.
"""

import dataclasses
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from alignvlm_jax.checkpoints import arrays, integrity, provenance
from alignvlm_jax.checkpoints.retention import kept_steps
from alignvlm_jax.checkpoints.workdir import (
    CHECKPOINTS_FOLDER,
    Progress,
    complete_steps,
    numbered_steps,
    read_meta,
    warn_passed_over,
)
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_to_dict
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import Params
from alignvlm_jax.parallel import distributed

_MAX_FAILURES = 3


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
        self._store = arrays.StepStore()
        self._completing: threading.Thread | None = None
        self._failure: tuple[Path, Exception] | None = None
        self._failures = 0
        self._newest: int | None = None  # the step last saved, or known to be undamaged
        self._passed_over: set[int] = set()  # steps that are damaged
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
            self._store.close()

    def save(
        self,
        progress: Progress,
        params: Params,
        opt_state: Any,
        data: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves in the background; a step that is saved already is left as it is.

        Args:
          progress: where the run stands.
          params: weights.
          opt_state: state of the optimizer.
          data: where the data stand, as JSON can hold it; `data_state` gives it back.
          metrics: what the run has come to, for `checkpoint.keep_best`.

        Raises:
          UserError: saving failed, and failed before.
        """
        trees = {"params": params, "opt_state": opt_state}
        self._save(progress, trees, {"data": data, "metrics": dict(metrics or {})})

    def save_params(self, progress: Progress, params: Params) -> None:
        """Saves weights alone, as the start of a stage: its optimizer is made when training begins."""
        self._save(progress, {"params": params}, {})

    def wait(self) -> None:
        """Until everything is on disk.

        Raises:
          UserError: what was saved last did not get there.
        """
        self._join(failures_allowed=0)

    def latest(self) -> Progress | None:
        """The progress of the newest undamaged checkpoint, None if the run has none yet. Those passed over are named.

        Raises:
          UserError: there are some, and all are damaged: to begin anew would delete them.
        """
        self._join()
        there = {step: integrity.is_sealed(self._folder / str(step)) for step in numbered_steps(self._folder)}
        there, reasons = dict(distributed.gather_json(list(there.items()))[0]), []
        for step in reversed(there):
            path = self._folder / str(step)
            if step != self._newest:
                share = (jax.process_index(), jax.process_count())
                found = distributed.gather_json(integrity.damage(path, share=share))
                if reason := next(filter(None, found), None):
                    warn_passed_over(path, reason)
                    self._passed_over.add(step)
                    reasons.append(f"step {step}: {reason}")
                    continue
                self._newest = step
            return Progress(**read_meta(path)["progress"])
        # A single one that was never finished is what a run leaves that is killed while it saves for the first time.
        if len(there) > 1 or any(there.values()):
            raise UserError(
                f"{self._folder} holds no undamaged checkpoint to go on from ({'; '.join(reasons)}). A run that began "
                "anew would delete these: move the folder away if that is what you want, or choose another workdir"
            )
        return None

    def data_state(self, progress: Progress) -> dict[str, Any] | None:
        """What was saved of the data at `progress`, if anything was."""
        return read_meta(self._folder / str(progress.step)).get("data")

    def config(self, progress: Progress) -> dict[str, Any]:
        """The config under which `progress` was saved, as nested dicts."""
        return read_meta(self._folder / str(progress.step))["config"]

    def has_optimizer(self, progress: Progress) -> bool:
        """Whether the checkpoint at `progress` can be gone on from in the middle of its stage."""
        return (self._folder / str(progress.step) / "opt_state").is_dir()

    def restore(self, progress: Progress, params: Params, opt_state: Any) -> tuple[Params, Any]:
        """Returns the weights and the optimizer's state saved at `progress`.

        Args:
          progress: the checkpoint to read.
          params: shapes, dtypes and shardings of the weights, on any mesh.
          opt_state: the same of the optimizer's state.
        """
        restored = self._restore(progress, params=params, opt_state=opt_state)
        return restored.params, restored.opt_state

    def restore_params(self, progress: Progress, abstract: Params) -> Params:
        """The weights alone: what the next stage starts from."""
        return self._restore(progress, params=abstract).params

    def _restore(self, progress: Progress, **abstract: Any) -> Any:
        return self._store.restore(self._folder / str(progress.step), **abstract)

    def _save(self, progress: Progress, trees: Mapping[str, Any], more: Mapping[str, Any]) -> None:
        self._join()
        if progress.step == self._newest:
            return
        self._failure = None
        step = self._folder / str(progress.step)
        meta = {**_meta(self._config, progress), **more}
        try:
            if distributed.is_primary():
                self._clean_up()
                integrity.remove(step)  # damaged, or of a past that was given up
            self._store.save(step, trees, meta)
        except Exception as error:
            self._fail(step, error)
            return self._join()
        self._completing = threading.Thread(target=self._complete, args=(step,), name="checkpoint")
        self._completing.start()

    def _complete(self, step: Path) -> None:
        """In the background: once Orbax is done, makes the step complete and deletes those that are not to stay."""
        try:
            self._store.wait()
            integrity.seal(step, jax.process_index(), jax.process_count())
            if distributed.is_primary():
                integrity.wait_for_seals(step)
            self._newest, self._failures = int(step.name), 0
            self._passed_over.discard(int(step.name))
        except Exception as error:
            return self._fail(step, error)
        try:
            if distributed.is_primary():
                self._delete_old(int(step.name))
        except OSError as error:  # is no harm to the new one
            why = f"{error.filename or self._folder}: {error.strerror or error}"
            distributed.log(f"warning: older checkpoints could not be deleted: {why}", file=sys.stderr)

    def _fail(self, step: Path, error: Exception) -> None:
        self._failure = step, error
        self._failures += 1
        if arrays.storage_words(error) is not None:
            self._store.start_again()
            if jax.process_count() == 1:  # else others are writing into it, and the next start clears it away
                integrity.remove(step)
                shutil.rmtree(arrays.remnant(step), ignore_errors=True)
            distributed.log(f"warning: {self._describe(step, error)}", file=sys.stderr)

    def _join(self, failures_allowed: int | None = None) -> None:
        """Waits for the save under way, and raises what went wrong if that is more than is allowed."""
        if self._completing:
            self._completing.join()
            self._completing = None
        if self._failure is None:
            return
        step, error = self._failure
        if arrays.storage_words(error) is None:
            raise error
        if failures_allowed is None:
            failures_allowed = _MAX_FAILURES - 1 if jax.process_count() == 1 else 0
        if self._failures > failures_allowed:
            raise UserError(self._describe(step, error)) from error

    def _describe(self, step: Path, error: Exception) -> str:
        good = [complete for complete in complete_steps(self._folder) if complete != int(step.name)]
        left = f"the newest checkpoint is {self._folder / str(good[-1])}" if good else "there is no other"
        return f"step {step.name} could not be saved in {step}: {arrays.storage_words(error)}; {left}"

    def _clean_up(self) -> None:
        """Removes, once, what an earlier sitting was writing when it was killed."""
        if not self._cleaned_up:
            for path in arrays.remnants(self._folder):
                shutil.rmtree(path, ignore_errors=True)
            self._cleaned_up = True

    def _delete_old(self, newest: int) -> None:
        """Deletes what the rules do not keep, what was found damaged, and what is later: that past was given up."""
        complete = [step for step in complete_steps(self._folder) if step <= newest and step not in self._passed_over]
        metrics = {step: self._metrics(step) for step in complete}
        kept = kept_steps(metrics, self._config.checkpoint)
        for step in numbered_steps(self._folder):
            if step not in kept:
                integrity.remove(self._folder / str(step))

    def _metrics(self, step: int) -> dict[str, float]:
        try:
            return read_meta(self._folder / str(step)).get("metrics") or {}
        except (OSError, ValueError):  # damaged since: no reason to lose the new one
            return {}


def _meta(config: ExperimentConfig, progress: Progress) -> dict[str, Any]:
    return {
        "progress": dataclasses.asdict(progress),
        "config": config_to_dict(config),
        "versions": provenance.versions(),
    }
