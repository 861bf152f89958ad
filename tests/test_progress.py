"""Tests of progress on a terminal and in a log file."""

import io
import os
import subprocess
import sys

import pytest
from tqdm import tqdm

from alignvlm_jax import progress
from alignvlm_jax.progress import exclude_first_step, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clocks of the module and of tqdm; a test advances them by `clock[0] += seconds`."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def _run(clock, monkeypatch, stream, seconds, **options):
    """Iterates over ten items that take `seconds` each, and returns what is written to the stream."""
    monkeypatch.setattr("sys.stderr", stream)
    for _ in progress_bar(range(10), "reading", unit="page", **options):
        clock[0] += seconds
    return stream.getvalue()


def test_a_terminal_shows_a_bar(clock, monkeypatch):
    assert "\r" in _run(clock, monkeypatch, Terminal(), 1.0, leave=True)


def test_a_log_file_has_a_line_every_half_minute(clock, monkeypatch):
    """tqdm/tqdm#750, huggingface/transformers#28683: carriage returns make the log of a job unreadable."""
    lines = _run(clock, monkeypatch, io.StringIO(), 16.0).splitlines(keepends=True)
    assert all(line.endswith("\n") and "\r" not in line and "\x1b" not in line for line in lines)
    assert lines[0] == "reading: 1/10 page, 00:16, 02:24 left\n"
    assert lines[1] == "reading: 3/10 page, 00:48, 01:52 left\n"
    assert lines[-1] == "reading: 10/10 page, 02:40, 00:00 left\n"
    assert len(lines) == 6


@pytest.mark.parametrize(("seconds", "options"), [(0.5, {}), (60.0, {"lines": False}), (60.0, {"show": False})])
def test_short_and_hidden_operations_print_nothing_in_a_log_file(clock, monkeypatch, seconds, options):
    assert _run(clock, monkeypatch, io.StringIO(), seconds, **options) == ""


_PROGRAM = """
from alignvlm_jax.progress import exclude_first_step, progress_bar
with progress_bar(total=3) as bar:
    exclude_first_step(bar)
    bar.update()
    bar.set_description("training")
for _ in progress_bar(range(3), show=True, delay=2, unit_scale=16):
    pass
print("done")
"""


def test_the_variable_of_tqdm_turns_bars_off():
    """tqdm/tqdm#1125, tqdm/tqdm#624: a disabled bar lacks some attributes. TQDM_DISABLE=1 disables all of them."""
    environ = {**os.environ, "TQDM_DISABLE": "1"}
    # tqdm reads the variable when it is imported.
    process = subprocess.run([sys.executable, "-c", _PROGRAM], env=environ, capture_output=True, text=True, timeout=60)
    assert (process.stdout, process.stderr) == ("done\n", "")


def test_a_message_between_the_lines_does_not_repeat_them(clock, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar(total=4, desc="drawing", unit="page") as bar:
        for _ in range(4):
            clock[0] += 6.0
            bar.update()
            tqdm.write("a message", file=stream)
    assert stream.getvalue().count("drawing") == 2


def test_the_time_left_does_not_include_the_compilation(clock, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar(total=12, desc="training") as bar:
        clock[0] += 500.0  # the first step compiles
        exclude_first_step(bar)
        clock[0] += 2.0
        bar.update()
        assert bar.n == 2
        assert "00:20" in str(bar)
