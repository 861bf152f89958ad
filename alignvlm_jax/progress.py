"""Progress of long operations: a bar on a terminal, an occasional line in a log file.

TQDM_DISABLE=1 turns both off, and the other TQDM_ variables set the defaults of the bars.
"""

import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

_FIRST_LINE_SECONDS, _LINE_SECONDS = 10.0, 30.0

_LINE_FORMAT = "{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed}, {remaining} left{postfix}"
_LINE_FORMAT_WITHOUT_TOTAL = "{desc}: {n_fmt} {unit}, {elapsed}{postfix}"


def progress_bar(
    iterable: Iterable[Any] | None = None,
    desc: str | None = None,
    *,
    show: bool = True,
    lines: bool = True,
    **options: Any,
) -> tqdm:
    """Returns a tqdm bar over `iterable`, or one that the caller updates.

    Args:
      iterable: the items to iterate over.
      desc: title of the bar.
      show: whether to show anything.
      lines: whether to print lines if stderr is not a terminal. An operation that takes less than ten seconds prints
        none, a longer one prints a line every half minute and one at its end.
      **options: further arguments of tqdm, such as `total` and `unit`.
    """
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    # tqdm reads TQDM_DISABLE only if `disable` is not passed.
    if not show or not (is_terminal or lines):
        return tqdm(iterable, desc, disable=True, **options)
    if is_terminal:
        return tqdm(iterable, desc, **{"dynamic_ncols": True, **options})
    has_total = options.get("total") is not None or hasattr(iterable, "__len__")
    line_format = options.get("bar_format") or (_LINE_FORMAT if has_total else _LINE_FORMAT_WITHOUT_TOTAL)
    return LineBar(iterable, desc, **options | {"bar_format": line_format.replace("|{bar}|", "")})


class LineBar(tqdm):
    """A bar that prints a line now and then, for a log file."""

    def __init__(self, *args: Any, **options: Any):
        # A nested bar would otherwise move the cursor of the terminal.
        defaults = {"bar_format": _LINE_FORMAT}
        super().__init__(*args, **defaults | options | {"file": _Lines(sys.stderr), "position": 0})


def exclude_first_step(bar: tqdm) -> None:
    """Counts one step whose time says nothing about the next ones, because it included a compilation."""
    bar.n += 1
    # The rate and the remaining time are estimated from the steps after `initial`.
    bar.initial = bar.last_print_n = bar.n
    if not bar.disable:
        bar.start_t = bar.last_print_t = time.time()
        bar.refresh()


class _Lines:
    """File that tqdm redraws its bar in; passes some of the redrawn texts on as lines."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._next_time = time.monotonic() + _FIRST_LINE_SECONDS
        self._latest = ""
        self._has_printed = False

    @property
    def encoding(self) -> str | None:
        """Encoding of the stream."""
        return getattr(self._stream, "encoding", None)

    def write(self, text: str) -> None:
        """Prints the text if a line is due, or if tqdm closes a bar that has printed lines."""
        self._latest = text.strip() or self._latest
        # tqdm writes a line break only when it closes a bar.
        is_due = time.monotonic() >= self._next_time or (text == "\n" and self._has_printed)
        if is_due and self._latest:
            self._stream.write(self._latest + "\n")
            self._latest, self._has_printed = "", True
            self._next_time = time.monotonic() + _LINE_SECONDS

    def flush(self) -> None:
        """Flushes the stream."""
        self._stream.flush()
