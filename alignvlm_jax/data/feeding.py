"""Prefetched batches for the training loop, with exact resumption.

Axis letters: K microbatches, B rows of a microbatch, b of these rows that this process builds.

The order of examples (`order.py`) is dealt out to B rows. Row r takes the positions r, r + B, r + 2 B, ... and packs
them independently of the other rows (`window.py`). Its bin number t * K + k becomes row r of microbatch k of step t.
The bins of a row are therefore a function of the config and the seed alone, and any process can make any row: step t
is the same batch on one host or on many, with few workers or many. A row's `Window` holds the row's position, so the
states of all windows are the complete state of the data.

    order   0  1  2  3  4  5  6  7 ...         B = 2
    row 0   0     2     4     6    ...    ->   bins [0 4] [2] [6 8] ...
    row 1      1     3     5     7 ...    ->   bins [1 3 5] [7 9] ...

A planning thread requests the sizes of examples, fills the windows, takes bins from them and requests their
examples. A pool of threads or processes measures and makes the examples. Images are in memory only for the few
batches that are being made or are ready.
"""

import collections
import concurrent.futures
import concurrent.futures.process
import itertools
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from alignvlm_jax.data.examples import ExampleReader, locate_example
from alignvlm_jax.data.packing import Batch, Example, Refused, empty_batch, write_bin
from alignvlm_jax.data.window import MeasuredExample, Window
from alignvlm_jax.data.workers import SignalBlockingContext, can_start_workers, exit_with_parent, watch_workers
from alignvlm_jax.errors import UserError

RowStates = Mapping[str, Any]
"""The state of each row, by row number; serializable as JSON."""

# Positions measured per task. A round trip to a worker process costs as much as measuring one example.
_POSITIONS_PER_TASK = 16

# The share of refused examples is checked only after this number of examples; before that it is too noisy.
MIN_EXAMPLES_TO_JUDGE = 1000


class BatchIterator(Protocol):
    """An iterator over batches that reports its position in the data."""

    def __iter__(self) -> "BatchIterator": ...

    def __next__(self) -> Batch:
        """Returns the next batch, [K, b, ...]."""

    def state(self) -> RowStates:
        """Returns the state of the rows after the batches returned so far."""

    def refused(self) -> list[Refused]:
        """Returns, once, the examples refused for the batches returned since the previous call."""

    def name(self, number: int) -> str:
        """Returns the readable name of the example with this entry in `example_ids`."""

    def close(self) -> None:
        """Stops the threads and processes behind the iterator."""


class Pool:
    """Measures and builds examples, in threads of this process or in other processes.

    Where worker processes cannot be started, threads take their place, with a warning. The batches are the same.
    """

    def __init__(self, reader: ExampleReader, *, workers: int = 0, threads: int = 2):
        self._reader = reader
        if workers and can_start_workers("threads read the data (config.data.workers=0)"):
            # On Ctrl-C or SIGTERM the training process still finishes its step and saves a checkpoint. It may need
            # these workers for that, so the signals must not end them.
            self._executor = concurrent.futures.ProcessPoolExecutor(
                workers, SignalBlockingContext(), initializer=_init_worker, initargs=(reader,)
            )
            self._stop_watching = watch_workers(self._executor)
            self._submit = self._executor.submit
        else:
            self._executor = concurrent.futures.ThreadPoolExecutor(threads, "read")
            self._stop_watching = lambda: None
            self._submit = lambda function, items: self._executor.submit(function, items, reader)

    def measure(self, positions: Sequence[int]) -> "concurrent.futures.Future[list[list[MeasuredExample | Refused]]]":
        """Starts measuring the examples at each of these positions."""
        return self._submit(_measure, positions)

    def make(
        self, examples: Sequence[MeasuredExample]
    ) -> "concurrent.futures.Future[list[Example | tuple[Refused, ...]]]":
        """Starts making the tokens and tiles of the examples."""
        return self._submit(_make, examples)

    def close(self) -> None:
        """Stops the threads or processes; tasks that have not started are dropped."""
        self._stop_watching()
        self._executor.shutdown(wait=True, cancel_futures=True)


class Feed:
    """`BatchIterator` that builds the batches of a stage, or some of their rows. Call `close` when done.

    Args:
      reader: reader of the stage's examples.
      rows: rows of a microbatch to build, in the order they have in the batch.
      microbatches: K.
      state: state of these rows to resume from (other rows are ignored); None starts at the beginning.
      num_positions: number of positions after which the order ends and bins are empty; None means an endless order.
      workers: number of processes that make examples; 0 uses `threads` threads of this process.
      threads: number of threads that make examples if there are no worker processes.
      prefetch: number of batches kept ready or in progress.
      max_refused: largest share of refused examples since this feed was created; above it, the feed raises a
        `UserError`.
    """

    def __init__(
        self,
        reader: ExampleReader,
        rows: Sequence[int],
        microbatches: int,
        state: RowStates | None = None,
        *,
        num_positions: int | None = None,
        workers: int = 0,
        threads: int = 2,
        prefetch: int = 2,
        max_refused: float = 1.0,
    ):
        self._reader, self._rows, self._microbatches = reader, tuple(rows), microbatches
        self._max_refused, self._prefetch = max_refused, prefetch
        windows = [_make_window(reader, row, state) for row in rows]
        self._pool = Pool(reader, workers=workers, threads=threads)
        stride = reader.packing.bins_per_microbatch
        self._sources = [_Row(self._pool, window, stride, num_positions, self._check_refusals) for window in windows]
        self._reasons: collections.Counter[str] = collections.Counter()
        self._state = self._row_states()
        self._refused: list[Refused] = []
        # One slot is enough: the queue only hands batches over, and `prefetch` limits how many are in progress.
        self._ready: queue.Queue = queue.Queue(1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Batch:
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # the planning thread has ended: a later call must raise again, not block
            raise item
        batch, self._state, refused = item
        self._refused += refused
        return batch

    def state(self) -> RowStates:
        """Returns the state of the rows after the batches returned so far."""
        return self._state

    def refused(self) -> list[Refused]:
        """Returns, once, the examples refused for the batches returned since the previous call."""
        refused, self._refused = self._refused, []
        return refused

    def name(self, number: int) -> str:
        """Returns the readable name of the example with this entry in `example_ids`."""
        source, index = locate_example(self._reader.parts, number)
        records = next(part.records for part in self._reader.parts if part.name == source)
        return f"{records[index].get('id', index)} of {source}"

    def close(self) -> None:
        """Stops the planning thread and the pool."""
        self._closed.set()
        self._thread.join()
        self._pool.close()

    def _run(self) -> None:
        """Runs in the planning thread: delivers batches until the feed is closed or an error occurs."""
        try:
            # Keep `prefetch` steps planned: finish the oldest, deliver it, and plan a new one.
            plans = (self._plan() for _ in itertools.count())
            in_progress = collections.deque(itertools.islice(plans, self._prefetch))
            while self._deliver(self._finish(*in_progress.popleft())):
                in_progress.append(next(plans))
        except concurrent.futures.process.BrokenProcessPool:
            self._deliver(
                UserError(
                    "a process that reads data was killed, perhaps because memory ran out: use fewer processes "
                    "(config.data.workers) or fewer prefetched batches (config.data.prefetch_batches)"
                )
            )
        except BaseException as error:  # raised again in the thread that asks for the next batch
            self._deliver(error)

    def _deliver(self, item: Any) -> bool:
        """Puts a batch or an error in the queue; returns False if the feed was closed before there was room."""
        # A plain put() would block forever once the consumer stops taking batches, and close() would wait for it.
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def _plan(self) -> tuple[list[Any], RowStates]:
        """Takes the bins of one step from the windows and requests their examples."""
        bins = []  # ((microbatch, row), future of the examples or None, refused examples) of each bin
        for k in range(self._microbatches):
            for index, source in enumerate(self._sources):
                examples, refused = source.pop_bin()
                bins.append(((k, index), self._pool.make(examples) if examples else None, refused))
        # The state belongs to the batch: it is the state after this step, however far ahead the planning is.
        return bins, self._row_states()

    def _finish(self, bins: list[Any], state: RowStates) -> tuple[Batch, RowStates, list[Refused]]:
        """Waits for the examples of a step and writes them to a batch."""
        reader, all_refused = self._reader, []
        batch = empty_batch(
            self._microbatches,
            len(self._rows),
            reader.packing,
            tile_size=reader.tiling.tile_size,
            pad_id=reader.chat.pad_id,
            resampled=reader.tiling.rule == "anyres_max_9",
            is_tree=reader.grouping == "tree",
        )
        for place, future, refused in bins:
            results = future.result() if future else []
            # Some damage shows only when an image is decoded, after the example was measured and given a bin.
            unreadable = [refused for result in results if not isinstance(result, Example) for refused in result]
            for example in unreadable:
                self._check_refusals(example)
            examples = [example for example in results if isinstance(example, Example)]
            write_bin(batch, place, examples, reader.tokens_per_tile)
            refused = refused + unreadable
            batch["num_refused"][place] = len(refused)
            all_refused += refused
        return batch, state, all_refused

    def _row_states(self) -> RowStates:
        """Returns the current states of the windows."""
        return {str(row): source.window.state() for row, source in zip(self._rows, self._sources, strict=True)}

    def _check_refusals(self, refused: Refused) -> None:
        """Counts a refused example and raises a `UserError` if there are too many of them."""
        # Reasons that differ only in numbers are counted together.
        self._reasons[re.sub(r"\d+", "N", refused.reason)] += 1
        num_seen, num_refused = sum(source.num_seen for source in self._sources), self._reasons.total()
        if num_refused > self._max_refused * max(num_seen, MIN_EXAMPLES_TO_JUDGE):
            reasons = "; ".join(f"{number} x {reason}" for reason, number in self._reasons.most_common(5))
            raise UserError(
                f"{num_refused} of {num_seen} examples read so far were refused, more than the limit of "
                f"{self._max_refused:.1%} ({reasons}). Fix the data, or raise config.data.max_refused"
            )


class _Row:
    """One row: its window and the examples that are being measured for it."""

    def __init__(
        self,
        pool: Pool,
        window: Window,
        stride: int,
        num_positions: int | None,
        on_refused: Callable[[Refused], None],
    ):
        self.window, self.num_seen = window, 0
        self._pool, self._stride, self._on_refused = pool, stride, on_refused
        # The row's positions in the order, from the first one that has not entered the window.
        self._positions = (
            itertools.count(window.next_position, stride)
            if num_positions is None
            else iter(range(window.next_position, num_positions, stride))
        )
        self._measuring: collections.deque = collections.deque()
        self._measured: Iterator[list[MeasuredExample | Refused]] = iter(())
        # Measure one window ahead: that is the largest number of examples that one bin can make room for.
        self._chunks_ahead = max(1, window.config.window // _POSITIONS_PER_TASK)
        self._look_ahead()

    def pop_bin(self) -> tuple[list[MeasuredExample], list[Refused]]:
        """Returns the examples of the row's next bin, and the examples refused since the previous bin."""
        refused = []
        # A refused example takes no place in the window, but it advances the position.
        while self.window.has_room and (examples := self._next()) is not None:
            self.window.next_position += self._stride
            for example in examples:
                if isinstance(example, Refused):
                    self.num_seen += 1
                    refused.append(example)
                    self._on_refused(example)
                else:
                    self.num_seen += example.questions
                    self.window.waiting.append(example)
        return self.window.pop_bin(), refused

    def _next(self) -> list[MeasuredExample | Refused] | None:
        """Returns the examples at the next position of the row's part of the order, or None at its end."""
        while (examples := next(self._measured, None)) is None:
            if not self._measuring:
                return None
            self._measured = iter(self._measuring.popleft().result())
            self._look_ahead()
        return examples

    def _look_ahead(self) -> None:
        """Keeps the next chunks of positions in the pool's queue."""
        while len(self._measuring) < self._chunks_ahead:
            positions = list(itertools.islice(self._positions, _POSITIONS_PER_TASK))
            if not positions:
                return
            self._measuring.append(self._pool.measure(positions))


def _make_window(reader: ExampleReader, row: int, state: RowStates | None) -> Window:
    """Returns the window of a row, new or restored from `state`."""
    if state is None:
        return Window(reader.packing, row)
    if str(row) not in state:
        raise UserError(
            f"the checkpoint has no data state for row {row}, only for rows {', '.join(state)}: was it written with "
            "another number of rows (config.data.packing.bins_per_microbatch)?"
        )
    return Window.from_state(reader.packing, state[str(row)])


# The reader of a worker process, sent once instead of with every task.
_worker_reader: ExampleReader | None = None


def _init_worker(reader: ExampleReader) -> None:
    """Runs once in each worker process."""
    global _worker_reader
    _worker_reader = reader
    exit_with_parent()


def _measure(positions: Sequence[int], reader: ExampleReader | None = None) -> list[list[MeasuredExample | Refused]]:
    """Measures the examples at each of these positions. A worker process uses its own reader."""
    return [(reader or _worker_reader).measure(position) for position in positions]


def _make(
    examples: Sequence[MeasuredExample], reader: ExampleReader | None = None
) -> list[Example | tuple[Refused, ...]]:
    """Builds measured examples. A worker process uses its own reader."""
    return [(reader or _worker_reader).make(example) for example in examples]
