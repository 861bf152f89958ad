"""From what each step measures to lines on the terminal and curves in TensorBoard."""

import math
import time
from pathlib import Path

import jax
import numpy as np
import tensorboardX

from alignvlm_jax.training.step import Metrics

# Shown per second, and as a sum; everything else is averaged.
_PER_SECOND = ("tokens", "tiles", "examples")
_COUNTED = ("refused", "cut")


class MetricsLog:
    """Collects the metrics of steps and writes one summary of them now and then.

    Metrics stay on the device until they are written, so that collecting does not wait for the step.
    """

    def __init__(self, folder: Path, first_step: int):
        # What an earlier sitting wrote after the checkpoint it is resumed from is done again: those points are dropped.
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=first_step + 1, flush_secs=10)
        self._since = time.monotonic()
        self._steps: list[Metrics] = []
        self._untimed = 0

    def restart_clock(self) -> None:
        """Leaves out of the speed what came since the last summary: compilation, a pause."""
        self._since, self._untimed = time.monotonic(), len(self._steps)

    def add(self, metrics: dict[str, jax.Array | float]) -> None:
        """The metrics of one more step."""
        self._steps.append(metrics)

    def write(self, step: int, stage: int) -> dict[str, float]:
        """Summarises the steps since the last time under `step`; returns the summary."""
        if not self._steps:
            return {}
        steps, self._steps = jax.device_get(self._steps), []
        now = time.monotonic()
        summary = {**averages(steps), **speeds(steps[self._untimed :], now - self._since)}
        self._since, self._untimed = now, 0
        for name, value in {**summary, "stage": stage}.items():
            if not math.isnan(value):
                self._writer.add_scalar(name if "/" in name else f"train/{name}", value, step)
        return summary

    def close(self) -> None:
        self._writer.close()


def averages(steps: list[dict[str, float]]) -> dict[str, float]:
    """Means over steps; loss and effective tokens are weighted by what they are means of. Counts are added up."""
    columns = {name: np.array([float(step[name]) for step in steps]) for name in steps[0]}
    weights = {"loss": columns["weight"], "effective_tokens": columns["tiles"]}
    summary = {}
    for name, values in columns.items():
        if name in _COUNTED:
            summary[name] = float(values.sum())
        elif name in weights:
            total = weights[name].sum()
            summary[name] = float((values * weights[name]).sum() / total) if total else math.nan
        elif name not in (*_PER_SECOND, "weight"):
            summary[name] = float(values.mean())
    return summary


def speeds(steps: list[dict[str, float]], seconds: float) -> dict[str, float]:
    """Steps and what they took in, per second; NaN if no step was timed."""
    per_second = 1 / seconds if steps and seconds > 0 else math.nan
    names = [name for name in _PER_SECOND if steps and name in steps[0]] or ["tokens"]
    summary = {f"{name}_per_second": sum(float(step[name]) for step in steps) * per_second for name in names}
    return summary | {"steps_per_second": len(steps) * per_second}


def line(step: int, stage: str, summary: dict[str, float]) -> str:
    """The summary in one line of the terminal:

    step 120 captions | loss 0.412 | grad norm 0.83 | 5,210 tokens/s | bins 84 % full | words per patch 3.1 | lr 9.1e-04
    """
    rates = {name: value for name, value in summary.items() if name.startswith("learning_rate/")}
    pieces = [f"step {step} {stage}", f"loss {summary['loss']:.4f}", f"grad norm {summary['grad_norm']:.2f}"]
    if not math.isnan(summary["tokens_per_second"]):
        pieces.append(f"{summary['tokens_per_second']:,.0f} tokens/s")
    pieces.append(f"bins {100 * summary['token_fraction']:.0f} % full")
    if not math.isnan(summary["effective_tokens"]):
        pieces.append(f"words per patch {summary['effective_tokens']:.1f}")
    pieces.append("lr " + "/".join(sorted({f"{value:.1e}" for value in rates.values()}, reverse=True)))
    if summary.get("refused"):
        pieces.append(f"{summary['refused']:.0f} examples refused")
    return " | ".join(pieces)
