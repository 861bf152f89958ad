"""The trackers of a run. A tracker that fails is dropped with one warning; the run and the other trackers continue."""

import contextlib
import importlib.util
import json
import math
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignvlm_jax.checkpoints.provenance import git_revision
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import distributed
from alignvlm_jax.training.tracking.tensorboard import TensorBoard
from alignvlm_jax.training.tracking.tracker import RunInfo, ShownAnswer, Tracker, named_answers
from alignvlm_jax.training.tracking.trackio import Trackio
from alignvlm_jax.training.tracking.weights_and_biases import WeightsAndBiases

IDS_FILE = "trackers.json"
"""File in the workdir with the identifier of the run in each tracker: {"wandb": "1f0c9a7e"}."""


class _Kind(NamedTuple):
    """A kind of tracker.

    Attributes:
      title: its name in messages.
      open: starts or resumes a run.
      package: the package that it needs, which is also the name of the extra.
    """

    title: str
    open: Callable[[RunInfo], Tracker]
    package: str | None = None


KINDS = {
    "tensorboard": _Kind("TensorBoard", TensorBoard),
    "wandb": _Kind("W&B", WeightsAndBiases, "wandb"),
    "trackio": _Kind("trackio", Trackio, "trackio"),
}
DEFAULT = ("tensorboard",)


def check_trackers(names: Sequence[str]) -> None:
    """Checks that all trackers are known and installed.

    Raises:
      UserError: if one is not.
    """
    for name in names:
        if name not in KINDS:
            raise UserError(f"--log-to: unknown tracker {name!r}: expected {', '.join(KINDS)} or none")
        package = KINDS[name].package
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(f'--log-to {name} needs one more package: pip install "alignvlm-jax[{package}]"')


class Trackers:
    """Trackers that are in use. A context, which closes them."""

    def __init__(self, trackers: Mapping[str, Tracker]):
        """Takes trackers by their names in `KINDS`."""
        self._trackers = dict(trackers)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._call("close", 0 if error is None else getattr(error, "exit_code", 1))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve, unless its value is NaN."""
        values = {name: float(value) for name, value in values.items() if not math.isnan(value)}
        self._call("log", step, values)

    def log_answers(self, step: int, split: str, answers: Sequence[ShownAnswer]) -> None:
        """Adds answers to questions of a split."""
        self._call("log_answers", step, named_answers(split, answers))

    def rewind(self, step: int) -> None:
        """Tells the trackers that the run is back at `step`."""
        self._call("rewind", step)

    def _call(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                _warn(name, error)
                del self._trackers[name]


def open_trackers(names: Sequence[str], workdir: Path, config: Mapping[str, Any], *, first_step: int) -> Trackers:
    """Starts or resumes the run in each tracker.

    Args:
      names: names in `KINDS`. Only process 0 passes some.
      workdir: folder of the run.
      config: the experiment, as nested dictionaries.
      first_step: number of steps that are already done.
    """
    known = _read_ids(workdir)
    ids = known | {name: secrets.token_hex(4) for name in names if name not in known}
    commit, trackers = git_revision() if names else None, {}
    for name in names:
        run = RunInfo(workdir, config, commit, first_step, id=ids[name], is_resumed=name in known)
        try:
            trackers[name] = KINDS[name].open(run)
        except Exception as error:
            _warn(name, error)
    if ids != known:
        try:
            (workdir / IDS_FILE).write_text(json.dumps(ids) + "\n", encoding="utf-8")
        except Exception as error:  # of a disk or a bucket
            distributed.log(f"warning: {workdir / IDS_FILE}: {_reason(error)}", file=sys.stderr)
    return Trackers(trackers)


def _read_ids(workdir: Path) -> dict[str, str]:
    # A file that is missing, damaged or out of reach means new runs in the trackers.
    with contextlib.suppress(Exception):
        ids = json.loads((workdir / IDS_FILE).read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in ids.items()}
    return {}


def _warn(name: str, error: Exception) -> None:
    distributed.log(f"warning: {KINDS[name].title}: {_reason(error)}. The run continues without it", file=sys.stderr)


def _reason(error: Exception) -> str:
    """Returns the message of an error as one line, without a period."""
    return " ".join(f"{getattr(error, 'strerror', None) or str(error) or type(error).__name__}".split()).rstrip(".")
