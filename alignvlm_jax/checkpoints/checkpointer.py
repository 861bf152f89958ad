"""Saves the checkpoints of a run in the background, finds them, and restores them onto any mesh.

A save has three steps: write the files, write their digests (`integrity.py`), and only then delete older checkpoints
(`retention.py`). Reading damaged files raises no error, so the digests are verified before anything is restored.
"""

import contextlib
import dataclasses
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from alignvlm_jax.checkpoints import arrays, integrity, provenance, staging, uploads
from alignvlm_jax.checkpoints.retention import kept_steps
from alignvlm_jax.checkpoints.workdir import (
    CHECKPOINTS_FOLDER,
    Progress,
    complete_steps,
    numbered_steps,
    read_meta,
    warn_skipped,
)
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.serialization import config_to_dict
from alignvlm_jax.errors import TemporaryError, UserError
from alignvlm_jax.leases.lease import Lease, LeaseLostError, NoLease
from alignvlm_jax.locations import absolute, is_bucket
from alignvlm_jax.models.alignvlm import Params
from alignvlm_jax.parallel import distributed
from alignvlm_jax.storage.errors import translate

_MAX_FAILURES = 3  # failed saves in a row


class Checkpointer:
    """Saves and restores the training states of one run.

    Use it as a context manager, whose exit waits until the last save is complete. With several processes, all of them
    must make the same calls.

    A save that fails (a full disk, a folder that cannot be written) is reported at once and leaves earlier steps
    untouched. A run of one process continues and tries again at its next checkpoint; after `_MAX_FAILURES` failures in
    a row, it ends. A run of several processes ends at the first failure, because Orbax makes them wait for each other.
    """

    def __init__(self, workdir: Path, config: ExperimentConfig, lease: Lease | None = None):
        """Opens the checkpoints of a run.

        Args:
          workdir: folder of the run.
          config: the experiment.
          lease: lease of the folder. It is checked before a step is written, and before it is sealed. A workdir that
            is only read, or that no other process can know, needs none.
        """
        self._config = config
        self._lease = lease or NoLease()
        self._folder = absolute(workdir / CHECKPOINTS_FOLDER)
        self._store = arrays.StepStore()
        self._completing: threading.Thread | None = None  # runs `_complete` for the save in progress
        # The thread changes these attributes. The caller's thread uses them only after `_join`, so no lock is needed.
        self._failure: tuple[Path, Exception] | None = None  # of the last save, with the folder of its step
        self._num_failures = 0  # in a row
        self._newest: int | None = None  # the step that was saved last, or is known to be undamaged
        self._damaged: set[int] = set()  # steps whose files do not match their digests
        self._is_cleaned_up = False

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        try:
            if kind is None:
                self.wait()
            elif self._completing:
                # Finishes the save without raising its error, which would hide the error that ends the block.
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
        """Saves a training state in the background. A step that is already saved is not written again.

        Args:
          progress: progress of the run.
          params: weights.
          opt_state: state of the optimizer.
          data: state of the data as values that JSON can hold; `data_state` returns it.
          metrics: the newest metrics, for `checkpoint.keep_best`.

        Raises:
          UserError: if saves have failed too often.
        """
        trees = {"params": params, "opt_state": opt_state}
        self._save(progress, trees, {"data": data, "metrics": dict(metrics or {})})

    def save_params(self, progress: Progress, params: Params) -> None:
        """Saves weights without an optimizer state. A stage that starts from them creates a new one."""
        self._save(progress, {"params": params}, {})

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          UserError: if the last save failed.
        """
        self._join(failures_allowed=0)

    def latest(self) -> Progress | None:
        """Returns the progress of the newest undamaged checkpoint, or None if the run has none yet.

        A warning names each damaged checkpoint. With several processes, each verifies a share of the files.

        Raises:
          UserError: if all checkpoints are damaged.
        """
        self._join()
        seen = {step: integrity.is_sealed(self._folder / str(step)) for step in numbered_steps(self._folder)}
        # All processes use the list of process 0, because a new step may become visible to others later. It is sent as
        # pairs, because the keys of a JSON object would turn into strings.
        is_sealed, reasons = dict(distributed.gather_json(list(seen.items()))[0]), []
        for step in reversed(is_sealed):
            path = self._folder / str(step)
            if step != self._newest:
                share = (jax.process_index(), jax.process_count())
                damages = distributed.gather_json(integrity.damage(path, share=share))
                if reason := next(filter(None, damages), None):
                    warn_skipped(path, reason)
                    self._damaged.add(step)
                    reasons.append(f"step {step}: {reason}")
                    continue
                self._newest = step
            return Progress(**read_meta(path)["progress"])
        # A run that is killed during its first save leaves a single unsealed step. Anything more is worth keeping.
        if len(is_sealed) > 1 or any(is_sealed.values()):
            raise UserError(
                f"{self._folder} holds no undamaged checkpoint to resume from ({'; '.join(reasons)}). A run that "
                "starts over would delete these: move the folder away to start over, or choose another workdir"
            )
        return None

    def data_state(self, progress: Progress) -> dict[str, Any] | None:
        """Returns the state of the data saved at `progress`, or None if none was saved."""
        return read_meta(self._folder / str(progress.step)).get("data")

    def config(self, progress: Progress) -> dict[str, Any]:
        """Returns the config with which `progress` was saved, as nested dicts."""
        return read_meta(self._folder / str(progress.step))["config"]

    def has_optimizer(self, progress: Progress) -> bool:
        """Returns whether the checkpoint holds an optimizer state, which resuming within a stage requires."""
        return (self._folder / str(progress.step) / "opt_state").is_dir()

    def restore(self, progress: Progress, params: Params, opt_state: Any) -> tuple[Params, Any]:
        """Returns the weights and the optimizer state saved at `progress`.

        Args:
          progress: the checkpoint to read.
          params: shapes, dtypes and shardings of the weights, on any mesh.
          opt_state: shapes, dtypes and shardings of the optimizer state.
        """
        restored = self._restore(progress, params=params, opt_state=opt_state)
        return restored.params, restored.opt_state

    def restore_params(self, progress: Progress, abstract: Params) -> Params:
        """Returns the weights saved at `progress`, with the shapes, dtypes and shardings of `abstract`."""
        return self._restore(progress, params=abstract).params

    def _restore(self, progress: Progress, **abstract: Any) -> Any:
        return self._store.restore(self._folder / str(progress.step), **abstract)

    def _save(self, progress: Progress, trees: Mapping[str, Any], more: Mapping[str, Any]) -> None:
        self._join()  # one save at a time
        if progress.step == self._newest:
            return
        self._failure = None
        step = self._folder / str(progress.step)
        meta = {**_meta(self._config, progress), **more}
        try:
            if distributed.is_primary():
                # Without the lease, these may be the files of another run.
                self._lease.check()
                self._clean_up()
                # An existing step of this number is damaged, or later than the checkpoint that the run resumed from.
                integrity.remove(step)
            self._store.save(step, trees, meta)
        except Exception as error:
            self._fail(step, error)
            return self._join()
        self._completing = threading.Thread(target=self._complete, args=(step,), name="checkpoint")
        self._completing.start()

    def _complete(self, step: Path) -> None:
        """Runs in the background: waits for Orbax, seals the step and deletes the steps that are not kept."""
        try:
            self._store.wait()
            # On S3, other processes may still be uploading, and S3 compares the checksum of each upload itself.
            is_uploaded = not staging.is_staged(step) or jax.process_count() == 1
            if distributed.is_primary() and is_bucket(step) and is_uploaded:
                uploads.check(step)
            integrity.seal(step, jax.process_index(), jax.process_count(), check=self._lease.check)
            # Only process 0 deletes older steps, so only it must know that the new one is complete everywhere.
            if distributed.is_primary():
                integrity.wait_for_seals(step)
            self._newest, self._num_failures = int(step.name), 0
            self._damaged.discard(int(step.name))
        except Exception as error:
            return self._fail(step, error)
        try:
            if distributed.is_primary():
                self._delete_old(int(step.name))
        except (OSError, UserError) as error:
            # The new checkpoint is complete; failing to delete an old one must not end the run.
            reason = str(error)
            if isinstance(error, OSError):
                reason = f"{error.filename or self._folder}: {error.strerror or error}"
            distributed.log(f"warning: older checkpoints could not be deleted: {reason}", file=sys.stderr)

    def _fail(self, step: Path, error: Exception) -> None:
        """Records a failed save, for `_join` to raise, and removes what it wrote."""
        self._failure = step, error
        self._num_failures += 1
        # After the loss of the lease, the folder of this step may be another run's.
        if not isinstance(error, LeaseLostError) and arrays.storage_error_message(error) is not None:
            self._store.reset()
            # With several processes, others may still be writing here. The next session removes the remains.
            if jax.process_count() == 1:
                with contextlib.suppress(OSError, UserError):
                    integrity.remove(step)
                    _remove_unfinished(arrays.unfinished_folder(step))
            distributed.log(f"warning: {self._describe(step, error)}", file=sys.stderr)

    def _join(self, failures_allowed: int | None = None) -> None:
        """Waits for the save in progress, and raises its error if more saves in a row have failed than allowed."""
        if self._completing:
            self._completing.join()
            self._completing = None
        if self._failure is None:
            return
        step, error = self._failure
        if isinstance(error, LeaseLostError) or arrays.storage_error_message(error) is None:
            raise error
        if failures_allowed is None:
            failures_allowed = _MAX_FAILURES - 1 if jax.process_count() == 1 else 0
        if self._num_failures > failures_allowed:
            is_temporary = isinstance(translate(error), TemporaryError)
            raise (TemporaryError if is_temporary else UserError)(self._describe(step, error)) from error

    def _describe(self, step: Path, error: Exception) -> str:
        try:
            # A bucket that cannot be reached is only asked if it is not known yet, because that takes half a minute.
            others = [self._newest] if self._newest is not None else complete_steps(self._folder)
            others = [complete for complete in others if complete != int(step.name)]
            newest = f"the newest checkpoint is {self._folder / str(others[-1])}" if others else "there is no other"
        except UserError:
            newest = "earlier checkpoints are untouched"
        reason = str(arrays.storage_error_message(error)).removeprefix(f"{step}: ")
        return f"step {step.name} could not be saved in {step}: {reason}; {newest}"

    def _clean_up(self) -> None:
        """Removes, once, the unfinished saves of earlier sessions that were killed."""
        if not self._is_cleaned_up:
            for path in arrays.unfinished_folders(self._folder):
                _remove_unfinished(path)
            self._is_cleaned_up = True

    def _delete_old(self, newest: int) -> None:
        """Deletes the steps that the rules do not keep, damaged steps, and later steps."""
        # A step later than the newest was saved before the run returned to an earlier checkpoint.
        complete = [step for step in complete_steps(self._folder) if step <= newest and step not in self._damaged]
        metrics = {step: self._metrics(step) for step in complete}
        kept = kept_steps(metrics, self._config.checkpoint)
        for step in numbered_steps(self._folder):
            if step not in kept:
                integrity.remove(self._folder / str(step))

    def _metrics(self, step: int) -> dict[str, float]:
        try:
            return read_meta(self._folder / str(step)).get("metrics") or {}
        except (OSError, ValueError, UserError):
            # This old step was damaged after it was saved. That must not make the save of the new one fail.
            return {}


def _remove_unfinished(folder: Path) -> None:
    # In a bucket, an unfinished step has no folder of its own, and is removed like any other.
    if not is_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _meta(config: ExperimentConfig, progress: Progress) -> dict[str, Any]:
    return {
        "progress": dataclasses.asdict(progress),
        "config": config_to_dict(config),
        "versions": provenance.versions(),
    }
