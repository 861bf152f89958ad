"""Turns the metrics of steps into lines on the terminal and curves in the trackers.

Speeds are given for the whole run (`tokens_per_second`) and per chip. A chip is the unit that is sold; it may hold two
JAX devices (`parallel/chips.py`). `tflops_per_second_per_chip` counts the FLOPs that the model needs
(`training/flops.py`). `mfu` is that rate as a fraction of the chip's published bfloat16 peak, regardless of the run's
dtype. On a chip without a known peak, such as a CPU, there is no `mfu`.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from tqdm import tqdm

from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.models.alignvlm import AlignVLMConfig
from alignvlm_jax.parallel.chips import Chip, find_chip
from alignvlm_jax.training.flops import train_flops
from alignvlm_jax.training.tracking.trackers import Trackers
from alignvlm_jax.training.train_step import Metrics

# Treatment of a metric in a summary of several steps. Metrics that are not listed are averaged.
_SUMMED = ("refused", "cut", "skipped")
_NOT_SHOWN = ("weight", "answer_tokens", "squared_lengths", "data_seconds")  # only inputs of other metrics
_PER_SECOND = ("tokens", "tiles", "examples", "answers")  # shown as speeds
_PER_CHIP = ("tokens", "tiles")  # shown as speeds per chip, too
_MIN_SHOWN_WAIT = 0.03  # shares of time spent waiting below this are not printed


@dataclasses.dataclass(frozen=True)
class Machine:
    """Chips that the steps run on.

    Attributes:
      num_chips: number of chips.
      chip: data of their kind; None if its peak is not known.
    """

    num_chips: int
    chip: Chip | None = None

    @classmethod
    def from_devices(cls, devices: Sequence[jax.Device]) -> "Machine":
        """Returns the machine with these devices; several devices may be one chip."""
        chip = find_chip(devices[0].device_kind)
        return cls(max(1, len(devices) // (chip.devices_per_chip if chip else 1)), chip)


def step_flops(model: AlignVLMConfig, stage: StageConfig) -> Callable[[Mapping[str, float]], float]:
    """Returns a function from the metrics of a step to the FLOPs that the model needs for it."""

    def count(step: Mapping[str, float]) -> float:
        return train_flops(
            model,
            stage.trainable,
            tiles=float(step["tiles"]),
            tokens=float(step["tokens"]),
            answer_tokens=float(step["answer_tokens"]),
            squared_lengths=float(step["squared_lengths"]),
        ).total

    return count


class MetricsLog:
    """Collects the metrics of steps and writes summaries of them.

    Metrics stay on the device until they are written, so collecting them does not wait for the step.

    Attributes:
      last: latest written value of each metric.
    """

    def __init__(self, trackers: Trackers, machine: Machine):
        """Opens the log.

        Args:
          trackers: where the curves go.
          machine: chips that the run uses.
        """
        self._trackers = trackers
        self._machine = machine
        self._flops: Callable[[Mapping[str, float]], float] | None = None
        self._start_time = time.monotonic()
        self._steps: list[Metrics] = []
        self.last: dict[str, float] = {}
        self._num_untimed = 0  # steps since the last summary that do not count for speed

    def begin_stage(self, flops: Callable[[Mapping[str, float]], float]) -> None:
        """Starts a stage in which a step needs `flops(metrics of the step)` FLOPs."""
        self._flops = flops
        self.restart_clock()

    def restart_clock(self) -> None:
        """Excludes the time since the last summary from the speed, because of a compilation or a pause."""
        self._start_time, self._num_untimed = time.monotonic(), len(self._steps)

    def add(self, metrics: dict[str, jax.Array | float]) -> None:
        """Adds the metrics of one step."""
        self._steps.append(metrics)

    def write(self, step: int, stage: int) -> dict[str, float]:
        """Writes and returns a summary of the steps added since the last summary; returns {} if there are none."""
        if not self._steps:
            return {}
        # Raises an error if a step failed. Without this, copying the metrics of a failed step would abort the process
        # on a CPU.
        jax.block_until_ready(self._steps)
        steps, self._steps = jax.device_get(self._steps), []
        now = time.monotonic()
        timed = speeds(steps[self._num_untimed :], now - self._start_time, self._machine, self._flops)
        summary = {**averages(steps), **timed}
        self._start_time, self._num_untimed = now, 0
        self.last |= summary
        scalars = {name if "/" in name else f"train/{name}": value for name, value in summary.items()}
        self._trackers.log(step, {**scalars, "train/stage": stage})
        return summary


def averages(steps: list[dict[str, float]]) -> dict[str, float]:
    """Returns means over steps, and sums of counts.

    The loss is weighted by answer tokens and the effective tokens are weighted by tiles, because these are the numbers
    that each step's mean is over. Loss and gradient norm of skipped updates are excluded, because they are not finite.
    """
    columns = {name: np.array([float(step[name]) for step in steps]) for name in steps[0]}
    # If all updates were skipped, the summary shows the NaN.
    if "skipped" in columns and not columns["skipped"].all():
        finite = columns["skipped"] == 0
        columns |= {name: columns[name][finite] for name in ("loss", "weight", "grad_norm") if name in columns}
    weights = {"loss": columns["weight"], "effective_tokens": columns["tiles"]}
    summary = {}
    for name, values in columns.items():
        if name in _SUMMED:
            summary[name] = float(values.sum())
        elif name in weights:
            total = weights[name].sum()
            summary[name] = float((values * weights[name]).sum() / total) if total else math.nan
        elif name not in (*_PER_SECOND, *_NOT_SHOWN):
            summary[name] = float(values.mean())
    return summary


def speeds(
    steps: list[dict[str, float]],
    seconds: float,
    machine: Machine,
    flops: Callable[[Mapping[str, float]], float] | None = None,
) -> dict[str, float]:
    """Returns steps, tokens, tiles, examples, answers and FLOPs per second (NaN if no step was timed), and `data_wait`.

    `data_wait` is the share of the time that the loop waited for a batch.
    """
    per_second = 1 / seconds if steps and seconds > 0 else math.nan
    names = [name for name in _PER_SECOND if steps and name in steps[0]] or ["tokens"]
    summary = {f"{name}_per_second": sum(float(step[name]) for step in steps) * per_second for name in names}
    for name in _PER_CHIP:
        if f"{name}_per_second" in summary:
            summary[f"{name}_per_second_per_chip"] = summary[f"{name}_per_second"] / machine.num_chips
    if flops is not None:
        rate = sum(map(flops, steps)) * per_second / machine.num_chips
        summary["tflops_per_second_per_chip"] = rate / 1e12
        if machine.chip is not None:
            summary["mfu"] = rate / machine.chip.peak_flops
    if steps and "data_seconds" in steps[0]:
        summary["data_wait"] = sum(float(step["data_seconds"]) for step in steps) * per_second
    return summary | {"steps_per_second": len(steps) * per_second}


def format_line(step: int, stage: str, summary: dict[str, float], steps_left: int = 0) -> str:
    """Formats the summary as one line for the terminal (here in two).

        step 120 captions | loss 0.4120 | grad norm 0.83 | 41,680 tokens/s | 42.5 answers/s | 5.21 tiles/s a chip |
        83.1 TFLOP/s a chip, MFU 42.2 % | bins 84 % full | words per patch 3.1 | lr 9.1e-04 | 1:02:10 left

    On a chip without a known peak there is no MFU. The time left assumes that the remaining steps of all stages take as
    long as those of the summary.
    """
    # Speeds are NaN if no step was timed. Connectors without a distribution over words have no words per patch.
    rates = {name: value for name, value in summary.items() if name.startswith("learning_rate/")}
    pieces = [f"step {step} {stage}", f"loss {summary['loss']:.4f}", f"grad norm {summary['grad_norm']:.2f}"]
    if not math.isnan(summary["tokens_per_second"]):
        pieces.append(f"{summary['tokens_per_second']:,.0f} tokens/s")
        if "answers_per_second" in summary:
            pieces.append(f"{summary['answers_per_second']:,.3g} answers/s")
        if "tiles_per_second_per_chip" in summary:
            pieces.append(f"{summary['tiles_per_second_per_chip']:.3g} tiles/s a chip")
        if "tflops_per_second_per_chip" in summary:
            mfu = f", MFU {100 * summary['mfu']:.1f} %" if "mfu" in summary else ""
            pieces.append(f"{summary['tflops_per_second_per_chip']:.3g} TFLOP/s a chip{mfu}")
    pieces.append(f"bins {100 * summary['token_fraction']:.0f} % full")
    if not math.isnan(summary.get("effective_tokens", math.nan)):
        pieces.append(f"words per patch {summary['effective_tokens']:.1f}")
    pieces.append("lr " + "/".join(f"{rate:.1e}" for rate in sorted(set(rates.values()), reverse=True)))
    if steps_left and summary["steps_per_second"] > 0:
        pieces.append(f"{tqdm.format_interval(steps_left / summary['steps_per_second'])} left")
    # Problems are shown only if there are any.
    if summary.get("data_wait", 0.0) > _MIN_SHOWN_WAIT:
        pieces.append(f"{100 * summary['data_wait']:.0f} % of the time waiting for data")
    if summary.get("skipped"):
        pieces.append(f"{summary['skipped']:.0f} updates skipped")
    if summary.get("refused"):
        pieces.append(f"{summary['refused']:.0f} examples refused")
    return " | ".join(pieces)
