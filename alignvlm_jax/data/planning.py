"""Plans the number of bins per step and of steps per stage by measuring examples before the stage begins.

The number of bins per step is fixed, because a change of it would recompile the training step. The config states the
batch size in examples, as papers do. How many examples share a bin is measured with the windows and bins of
training. The plan holds for the whole stage and is saved in its checkpoints.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from alignvlm_jax.data.examples import ExampleReader
from alignvlm_jax.data.feeding import Pool
from alignvlm_jax.data.packing import Refused
from alignvlm_jax.data.window import MeasuredExample, Window
from alignvlm_jax.errors import UserError
from alignvlm_jax.progress import progress_bar

# Positions measured per task.
_POSITIONS_PER_TASK = 16
# Number of positions to measure, each an example or a group of them. The first estimates the examples per bin to a few
# percent, the second the bins per epoch to about one percent.
_SAMPLE_SIZE = 512
_EPOCH_SAMPLE_SIZE = 8192


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """The sizes that are fixed when a stage begins.

    Attributes:
      steps: number of steps.
      microbatches: K of every step.
      examples_per_bin: measured average.
      num_positions: number of positions of the order after which it ends, each an example or a group of examples
        (`examples.py`); None for an endless order.
    """

    steps: int
    microbatches: int
    examples_per_bin: float
    num_positions: int | None = None


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

    If the epochs of a stage are short enough to be measured completely, the stage ends with their last example: every
    example is used once per epoch, and the last bins may be empty. Longer epochs get the number of steps that their
    examples need on average; examples still in a window at the end are not used.

    Args:
      reader: reader of the stage's examples.
      global_batch: approximate number of examples per step; it is rounded to a whole number of microbatches.
      bins_per_step: fixed number of bins per step instead, a multiple of `bins_per_microbatch`.
      steps: length of the stage in steps; pass either this or `epochs`.
      epochs: length of the stage in epochs.
      threads: number of examples to measure at a time.
      progress: whether to show a progress bar if measuring takes seconds.

    Raises:
      UserError: if none of the measured examples can be used.
    """
    rows = reader.packing.bins_per_microbatch
    total = None if epochs is None else max(1, round(epochs * reader.num_groups))
    number = _SAMPLE_SIZE if total is None else min(total, _EPOCH_SAMPLE_SIZE)
    measured = _measure(reader, number, threads, progress)
    usable = _usable(measured)
    if not usable:
        first = measured[0][0]
        raise UserError(
            f"none of the {sum(map(len, measured))} examples measured can be used. The first is {first.id} of "
            f"{first.source}: {first.reason}"
        )
    # Pack all usable examples as one row, to estimate how many share a bin.
    bins = _count_bins(reader, iter(usable))
    # A tree counts as the number of its questions.
    examples_per_bin = sum(example.questions for example in usable) / bins
    microbatches = bins_per_step // rows if bins_per_step else max(1, round(global_batch / examples_per_bin / rows))
    if number == total:
        # All examples are known: pack each row exactly as training will, and let the longest row set the steps.
        most_bins = max(_count_bins(reader, iter(_usable(measured[row::rows]))) for row in range(rows))
        return StagePlan(math.ceil(most_bins / microbatches), microbatches, examples_per_bin, total)
    # Otherwise extrapolate from the sample, refused examples included.
    if total is not None:
        steps = math.ceil(total * bins / len(measured) / (microbatches * rows))
    return StagePlan(steps, microbatches, examples_per_bin)


def _usable(measured: Sequence[list[MeasuredExample | Refused]]) -> list[MeasuredExample]:
    """Returns the examples that can be used."""
    return [example for examples in measured for example in examples if isinstance(example, MeasuredExample)]


def _measure(reader: ExampleReader, number: int, threads: int, progress: bool) -> list[list[MeasuredExample | Refused]]:
    """Measures the examples at each of the first `number` positions of the order."""
    pool = Pool(reader, threads=threads)
    try:
        starts = range(0, number, _POSITIONS_PER_TASK)
        measuring = [pool.measure(range(start, min(start + _POSITIONS_PER_TASK, number))) for start in starts]
        title, scale = "measuring examples", _POSITIONS_PER_TASK
        bar = progress_bar(measuring, title, unit_scale=scale, unit="example", delay=2, show=progress)
        return list(itertools.chain.from_iterable(future.result() for future in bar))
    finally:
        pool.close()


def _count_bins(reader: ExampleReader, examples: Iterator[MeasuredExample]) -> int:
    """Returns the number of bins that one row packs these examples into."""
    window = Window(reader.packing, 0)
    for bins in itertools.count():
        window.waiting += itertools.islice(examples, reader.packing.window - len(window.waiting))
        if not window.pop_bin():
            return bins
