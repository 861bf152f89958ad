"""Watches for skipped updates and for jumps of the loss.

A step whose loss or gradients are not finite leaves weights and optimizer unchanged (`train_step.py`). Such skipped
updates are counted here. After `max_skipped` in a row, either the weights or the data are bad. The run then rolls back
to its last checkpoint and continues with the data that come *after* the failed steps:

    max_skipped = 3, a checkpoint at step 100
    updates 104, 105 and 106 are skipped; this is noticed when step 107 has started
    the weights return to step 100, batches 101 to 107 are skipped, and the new step 101 uses batch 108

The ranges of skipped batches are stored with every checkpoint, so the data remain a function of the seed, the step and
those ranges. Skipped updates and jumps are reported in `anomalies.jsonl` in the workdir, with the names of the examples
in the batch.
"""

import collections
import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from alignvlm_jax.config.run import AnomalyConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage.text_files import append_text

ANOMALIES_FILE = "anomalies.jsonl"
_HISTORY = 100  # number of past losses that a loss is compared with
_MIN_HISTORY = 20  # with fewer past losses, nothing counts as a jump


class AnomalyWatch:
    """Checks the loss of every step.

    Steps are checked one step late: reading the loss of a step that is still running would wait for it.

    Attributes:
      num_skipped_in_a_row: number of updates skipped since the last successful one.
      skipped_batches: ranges of batches that the run does not use again. Each range has the stage and the step that the
        run rolled back to, and the numbers of its first and last batch.
    """

    def __init__(self, config: AnomalyConfig, path: Path | None, log: Callable[[str], None]):
        """Starts with an empty history.

        Args:
          config: which anomalies to report.
          path: file for the reports; None writes none.
          log: prints a line.
        """
        self._config, self._path, self._log = config, path, log
        self._pending: collections.deque = collections.deque()
        self._losses: collections.deque[float] = collections.deque(maxlen=_HISTORY)
        self._unwritten: list[str] = []  # lines of the file
        self.num_skipped_in_a_row = 0
        self.skipped_batches: list[dict[str, int]] = []

    def state(self) -> dict[str, Any]:
        """Returns the state to store with a checkpoint. All steps before it must have been checked."""
        # "left_out" is the key in the checkpoints of all versions.
        return {"skipped_in_a_row": self.num_skipped_in_a_row, "left_out": list(self.skipped_batches)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned, and forgets the steps that are not checked yet."""
        self.num_skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self.skipped_batches = list(state.get("left_out", []))
        self._pending.clear()

    def add(self, step: int, measured: Mapping[str, jax.Array], names: Callable[[], list[str]]) -> None:
        """Adds a step that has started, to be checked later.

        Args:
          step: its number over all stages.
          measured: its metrics, which the devices may still be computing.
          names: returns the names of the examples in its batch. It is called only for an anomaly, by all processes.
        """
        self._pending.append((step, measured, names))

    def check(self, before: int) -> bool:
        """Waits for the steps before `before` and checks them; returns True if too many in a row were skipped."""
        while self._pending and self._pending[0][0] < before:
            step, measured, names = self._pending.popleft()
            loss = float(measured["loss"])
            skipped = float(measured["skipped"]) > 0
            self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if skipped else 0
            if skipped:
                self._report("skipped", step, loss, names, f"{self.num_skipped_in_a_row} in a row")
                if self.num_skipped_in_a_row >= self._config.max_skipped:
                    return True
            else:
                if self._is_spike(loss):
                    usual = statistics.median(self._losses)
                    self._report("spike", step, loss, names, f"usually {usual:.3g}")
                self._losses.append(loss)
        return False

    def skip_batches(self, stage: int, step_in_stage: int, last_batch: int) -> None:
        """Records a rollback to a step: the batches after it, up to `last_batch`, are not used again."""
        # Earlier rollbacks within the stage have shifted the batches against the steps.
        first = step_in_stage + self.num_skipped_batches(stage) + 1
        skipped = {"stage": stage, "step_in_stage": step_in_stage, "first": first, "last": last_batch}
        self.skipped_batches.append(skipped)
        self.num_skipped_in_a_row = 0
        self._pending.clear()

    def num_skipped_batches(self, stage: int) -> int:
        """Number of batches of a stage that were skipped by rollbacks."""
        return sum(entry["last"] - entry["first"] + 1 for entry in self.skipped_batches if entry["stage"] == stage)

    def num_rollbacks_to(self, stage: int, step_in_stage: int) -> int:
        """Number of times that the run rolled back to this step."""
        target = stage, step_in_stage
        return sum((entry["stage"], entry["step_in_stage"]) == target for entry in self.skipped_batches)

    def _is_spike(self, loss: float) -> bool:
        if not self._config.spike or len(self._losses) < _MIN_HISTORY:
            return False
        usual = statistics.median(self._losses)
        # 1.4826 times the median absolute deviation estimates the standard deviation of a normal distribution; unlike
        # the sample's own, it is robust against earlier jumps. The floor of 0.1 % of the loss prevents constant reports
        # while the loss hardly varies.
        spread = 1.4826 * statistics.median(abs(other - usual) for other in self._losses)
        return loss > usual + self._config.spike * max(spread, 1e-3 * abs(usual))

    def _report(self, kind: str, step: int, loss: float, names: Callable[[], list[str]], remark: str) -> None:
        examples = names()
        shown = ", ".join(examples[:5]) + (f" and {len(examples) - 5} more" if len(examples) > 5 else "")
        meaning = "update skipped: its loss or gradients are not finite" if kind == "skipped" else "the loss jumped"
        self._log(f"warning: step {step}: {meaning} (loss {loss:.4g}, {remark}); examples: {shown}")
        if self._path is None:
            return
        entry = {"step": step, "what": kind, "loss": loss if math.isfinite(loss) else str(loss), "examples": examples}
        self._unwritten.append(json.dumps(entry, ensure_ascii=False) + "\n")
        try:
            append_text(self._path, "".join(self._unwritten))
            self._unwritten.clear()
        except (OSError, UserError) as error:  # written with the next report
            self._log(f"warning: {self._path} cannot be written ({getattr(error, 'strerror', None) or error})")
