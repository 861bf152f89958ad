"""How many bins a step has and how many steps a stage, found by measuring examples before the stage begins.

A step has a fixed number of bins, because every other number compiles the training step anew. The batch that a stage
asks for is in examples, as papers give it; how many of those share a bin is measured, with the windows and bins of
training. The answer holds for the whole stage and is kept with its checkpoints.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from tqdm import tqdm

from alignvlm_jax.data.examples import ExampleReader
from alignvlm_jax.data.feeding import Pool
from alignvlm_jax.data.packing import Refused
from alignvlm_jax.data.window import Waiting, Window
from alignvlm_jax.errors import UserError

_MEASURED_TOGETHER = 16
# To know how many examples share a bin to a few per cent; to know how many bins an epoch is, to about one.
_SAMPLE = 512
_SAMPLE_OF_EPOCHS = 8192


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What is fixed as a stage begins.

    steps: how many there are.
    microbatches: K of every step.
    examples_per_bin: as measured, on average.
    num_examples: after so many the order of examples ends; None for an endless one.
    """

    steps: int
    microbatches: int
    examples_per_bin: float
    num_examples: int | None = None


def plan_stage(
    reader: ExampleReader,
    *,
    global_batch: int,
    bins_per_step: int | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    threads: int = 2,
    progress: bool = True,
) -> StagePlan:
    """Measures examples and plans a stage.

    A stage of so many epochs that are short enough to be measured whole ends with its last example: each is seen once
    an epoch, and the last bins may be empty. Longer epochs are as many steps as their examples need on average; what
    is still in a window at the end is not seen.

    Args:
      reader: of the stage's examples.
      global_batch: examples a step, about; a step has whole microbatches.
      bins_per_step: fixes the bins instead, a multiple of `bins_per_microbatch`.
      steps, epochs: how long the stage is: one of the two.
      threads: how many examples to measure at a time.
      progress: show a bar if it takes seconds.

    Raises:
      UserError: not one of the examples can be used.
    """
    rows = reader.packing.bins_per_microbatch
    total = None if epochs is None else max(1, round(epochs * reader.num_records))
    number = _SAMPLE if total is None else min(total, _SAMPLE_OF_EPOCHS)
    measured = _measure(reader, number, threads, progress)
    usable = [example for example in measured if isinstance(example, Waiting)]
    if not usable:
        first = measured[0]
        raise UserError(
            f"none of {number} examples can be used, of which the first is {first.id} of {first.source}: {first.reason}"
        )
    bins = _count_bins(reader, iter(usable))
    microbatches = bins_per_step // rows if bins_per_step else max(1, round(global_batch * bins / len(usable) / rows))
    if number == total:
        of_rows = ([e for e in measured[row::rows] if isinstance(e, Waiting)] for row in range(rows))
        most = max(_count_bins(reader, iter(examples)) for examples in of_rows)
        return StagePlan(math.ceil(most / microbatches), microbatches, len(usable) / bins, total)
    if total is not None:
        steps = math.ceil(total * bins / len(measured) / (microbatches * rows))
    return StagePlan(steps, microbatches, len(usable) / bins)


def _measure(reader: ExampleReader, number: int, threads: int, progress: bool) -> list[Waiting | Refused]:
    pool = Pool(reader, threads=threads)
    try:
        starts = range(0, number, _MEASURED_TOGETHER)
        measuring = [pool.measure(range(start, min(start + _MEASURED_TOGETHER, number))) for start in starts]
        bar = tqdm(measuring, desc="measuring examples", unit_scale=_MEASURED_TOGETHER, unit="example", delay=2)
        bar.disable = not progress
        return list(itertools.chain.from_iterable(future.result() for future in bar))
    finally:
        pool.close()


def _count_bins(reader: ExampleReader, examples: Iterator[Waiting]) -> int:
    """The bins that one row makes of these examples."""
    window = Window(reader.packing, 0)
    for bins in itertools.count():
        window.waiting += itertools.islice(examples, reader.packing.window - len(window.waiting))
        if not window.take_bin():
            return bins
