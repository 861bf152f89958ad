"""What is done when numbers go wrong: updates that are skipped, losses that jump.

The step itself leaves weights and optimizer alone when its loss or gradients are not finite (`step.py`). Here that is
counted. After `max_skipped` in a row, either the weights are spoilt or the data are: the run goes back to its last
checkpoint, and on from there with the data that come *after* the steps that failed:

    checkpoint of step 100; steps 104, 105, 106 are skipped, step 107 has begun; max_skipped = 3
    back to the weights of step 100; batches 101 to 107 are left out, the next step, 101, takes batch 108

What was left out is kept with every checkpoint, so the data remain a function of the seed, the step and that list. What
was skipped and what jumped goes into the workdir's `anomalies.jsonl`, with the names of the examples in the batch.
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

ANOMALIES_FILE = "anomalies.jsonl"
_HISTORY = 100  # losses that are looked back at
_ENOUGH = 20  # losses before which nothing counts as a jump


class AnomalyWatch:
    """Looks at the loss of every step, one step late, so that no step waits for it."""

    def __init__(self, config: AnomalyConfig, path: Path | None, say: Callable[[str], None]):
        """Args:
        config: what to look for.
        path: the file to report into; None writes none.
        say: prints a line.
        """
        self._config, self._path, self._say = config, path, say
        self._pending: collections.deque = collections.deque()
        self._losses: collections.deque[float] = collections.deque(maxlen=_HISTORY)
        self.in_a_row = 0
        self.left_out: list[dict[str, int]] = []

    def state(self) -> dict[str, Any]:
        """What is kept with a checkpoint; all steps before it must have been looked at."""
        return {"skipped_in_a_row": self.in_a_row, "left_out": list(self.left_out)}

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Undoes `state`; nothing is pending any more."""
        self.in_a_row, self.left_out = state.get("skipped_in_a_row", 0), list(state.get("left_out", []))
        self._pending.clear()

    def add(self, step: int, measured: Mapping[str, jax.Array], names: Callable[[], list[str]]) -> None:
        """A step that was begun; `names` tells its examples, should they matter. All processes must call it."""
        self._pending.append((step, measured, names))

    def look(self, before: int) -> bool:
        """Looks at the steps before this one, which must be done; whether they were too many."""
        while self._pending and self._pending[0][0] < before:
            step, measured, names = self._pending.popleft()
            loss = float(measured["loss"])
            skipped = float(measured["skipped"]) > 0
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            if skipped:
                self._report("skipped", step, loss, names, f"{self.in_a_row} in a row")
                if self.in_a_row >= self._config.max_skipped:
                    return True
            else:
                if self._is_spike(loss):
                    usual = statistics.median(self._losses)
                    self._report("spike", step, loss, names, f"usually {usual:.3g}")
                self._losses.append(loss)
        return False

    def leave_out(self, stage: int, step_in_stage: int, last_batch: int) -> None:
        """The run goes back to this step; the batches since, up to the last one, are not used again."""
        first = step_in_stage + self.num_left_out(stage) + 1
        self.left_out.append({"stage": stage, "step_in_stage": step_in_stage, "first": first, "last": last_batch})
        self.in_a_row = 0
        self._pending.clear()

    def num_left_out(self, stage: int) -> int:
        """The batches of a stage that were left out."""
        return sum(entry["last"] - entry["first"] + 1 for entry in self.left_out if entry["stage"] == stage)

    def returns_to(self, stage: int, step_in_stage: int) -> int:
        """How often the run has gone back to this step."""
        return sum((entry["stage"], entry["step_in_stage"]) == (stage, step_in_stage) for entry in self.left_out)

    def _is_spike(self, loss: float) -> bool:
        if not self._config.spike or len(self._losses) < _ENOUGH:
            return False
        usual = statistics.median(self._losses)
        spread = 1.4826 * statistics.median(abs(other - usual) for other in self._losses)
        return loss > usual + self._config.spike * max(spread, 1e-3 * abs(usual))

    def _report(self, what: str, step: int, loss: float, names: Callable[[], list[str]], remark: str) -> None:
        examples = names()
        shown = ", ".join(examples[:5]) + (f" and {len(examples) - 5} more" if len(examples) > 5 else "")
        meaning = "update skipped: its loss or gradients are not finite" if what == "skipped" else "the loss jumped"
        self._say(f"warning: step {step}: {meaning} (loss {loss:.4g}, {remark}); examples: {shown}")
        if self._path is None:
            return
        entry = {"step": step, "what": what, "loss": loss if math.isfinite(loss) else str(loss), "examples": examples}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        except OSError as error:
            self._say(f"warning: {self._path} cannot be written ({error.strerror})")
