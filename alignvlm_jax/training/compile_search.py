"""Searches for the fastest program that fits: many candidates at low effort, the best few at full effort.

    outcomes = search(ranked, compile, minutes=60, num_candidates=12, num_finalists=2)
    print(table(outcomes))
    best(outcomes).candidate.overrides()

The compiler is a function `compile(candidate, effort, seconds) -> report`, so that the search itself has no I/O: the
tool runs a process for each program, and the tests pass a function of their own. The report is that of
`ahead_of_time.compile_train_step`; None means that the compiler was stopped after `seconds`.

Two programs that differ only in what they keep for the backward pass are compared without compiling both: if the one
that keeps less does not fit, the other does not fit either; if the one that keeps more fits, the other is slower.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from alignvlm_jax.training.compile_candidates import Candidate, keeps_at_least

LOW, FULL = "low", "full"
"""Efforts of the compiler."""

_FULL_EFFORT = 3
"""Expected time of a program at full effort, in times at low effort, until one was compiled."""

Report = dict[str, Any]
Compile = Callable[[Candidate, str, float], Report | None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A compiled candidate.

    Attributes:
      candidate: the candidate.
      effort: `LOW` or `FULL`.
      report: the report of the compiled program. Its key "error" says why there is none.
    """

    candidate: Candidate
    effort: str
    report: Report

    @property
    def fits(self) -> bool:
        """True if the program compiles and fits in the chip's memory."""
        return bool(self.report.get("fits"))

    @property
    def gigabytes(self) -> float | None:
        """Memory of a chip in GB, or None if the compiler gave up."""
        size = self.report.get("per_chip_bytes")
        return None if size is None else size / 1e9

    @property
    def step_seconds(self) -> float:
        """Time of a step if everything overlaps, which does not depend on the effort."""
        return self.report["estimate"]["step_seconds_if_all_overlaps"]

    @property
    def scheduled_seconds(self) -> float | None:
        """Time of a step by the compiler's own schedule, which means something at full effort only."""
        return self.report["estimate"].get("step_seconds_by_schedule") if self.effort == FULL else None

    @property
    def seconds_per_example(self) -> float:
        """The time that ranks programs of the same effort."""
        return (self.scheduled_seconds or self.step_seconds) / self.report["examples"]


def search(
    ranked: Sequence[Candidate],
    compile_program: Compile,
    *,
    minutes: float,
    num_candidates: int,
    num_finalists: int,
    jobs: int = 1,
    clock: Callable[[], float] = time.monotonic,
    log: Callable[[str], None] = print,
) -> list[Outcome]:
    """Compiles candidates within a time limit and returns the outcomes, in the order in which they came.

    A candidate is not started if it is expected to take longer than the time left. At low effort, time for one program
    at full effort is left. A program that runs at the limit is stopped.

    Args:
      ranked: the candidates, most promising first.
      compile_program: compiles a candidate with an effort, within a number of seconds.
      minutes: the time limit.
      num_candidates: number of programs to compile at low effort.
      num_finalists: number of programs to compile at full effort.
      jobs: number of programs to compile at the same time.
      clock: returns the current time in seconds.
      log: prints a line of progress.
    """
    deadline = clock() + 60 * minutes
    outcomes: list[Outcome] = []

    def run(queue, effort, count, reserve):
        """Compiles up to `count` programs of the queue, while there is time for another."""
        queue, started, running = list(queue), 0, {}
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            while True:
                while queue and started < count and len(running) < jobs:
                    candidate = queue.pop(0)
                    reason = skip_reason(candidate, outcomes) if effort == LOW else None
                    if reason:
                        log(f"  skipped {candidate.describe()}: {reason}")
                        continue
                    left = deadline - clock()
                    if left <= 0 or expected_seconds(outcomes, effort) + reserve() > left:
                        log(f"  no time for another program at {effort} effort: {left / 60:.0f} min left")
                        queue.clear()
                        break
                    started += 1
                    log(f"[{started}/{count}, {effort} effort] {candidate.describe()}; {left / 60:.0f} min left")
                    running[pool.submit(compile_program, candidate, effort, left)] = candidate
                if not running:
                    return
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    candidate, report = running.pop(future), future.result()
                    if report is None:
                        log(f"  stopped at the time limit: {candidate.describe()}")
                        continue
                    outcomes.append(Outcome(candidate, effort, report))
                    log(f"  {describe_result(outcomes[-1])}")

    run(ranked, LOW, num_candidates, lambda: expected_seconds(outcomes, FULL) if num_finalists else 0.0)
    fitting = sorted((o for o in outcomes if o.fits), key=lambda o: o.seconds_per_example)
    run([outcome.candidate for outcome in fitting], FULL, num_finalists, lambda: 0.0)
    return outcomes


def skip_reason(candidate: Candidate, outcomes: Iterable[Outcome]) -> str | None:
    """Returns why a candidate cannot win, given the outcomes so far, or None."""
    for outcome in outcomes:
        if "error" in outcome.report:
            continue
        if not outcome.fits and keeps_at_least(candidate, outcome.candidate):
            return f"remat={outcome.candidate.language_remat}/{outcome.candidate.vision_remat} does not fit"
        if outcome.fits and keeps_at_least(outcome.candidate, candidate):
            return f"remat={outcome.candidate.language_remat}/{outcome.candidate.vision_remat} fits"
    return None


def expected_seconds(outcomes: Iterable[Outcome], effort: str) -> float:
    """Returns the time that a program is expected to take: the longest so far, or 0 if nothing is known."""
    times = {LOW: 0.0, FULL: 0.0}
    for outcome in outcomes:
        times[outcome.effort] = max(times[outcome.effort], outcome.report.get("compile_seconds", 0.0))
    return times[effort] or (_FULL_EFFORT * times[LOW] if effort == FULL else 0.0)


def best(outcomes: Iterable[Outcome]) -> Outcome | None:
    """Returns the fastest program that fits, of those at full effort if there are any."""
    fitting = [outcome for outcome in outcomes if outcome.fits]
    finalists = [outcome for outcome in fitting if outcome.effort == FULL]
    return min(finalists or fitting, key=lambda outcome: outcome.seconds_per_example, default=None)


def pareto(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Returns the fitting programs of each effort for which no other of it is as small and as fast."""

    def beats(one, other):
        costs = [(outcome.gigabytes, outcome.seconds_per_example) for outcome in (one, other)]
        return costs[0] != costs[1] and all(a <= b for a, b in zip(*costs, strict=True))

    fitting = [outcome for outcome in outcomes if outcome.fits]
    return [o for o in fitting if not any(beats(other, o) for other in fitting if other.effort == o.effort)]


def describe_result(outcome: Outcome) -> str:
    """Returns memory, cap and time of an outcome as a line."""
    if "error" in outcome.report:
        return f"failed: {outcome.report['error']}"
    seconds = f"compiled in {outcome.report['compile_seconds']:.0f} s"
    if outcome.gigabytes is None:
        return f"does not fit, {seconds}"
    cap = 100 * outcome.report["estimate"]["model_flops_utilization"]
    fits = "fits" if outcome.fits else "does not fit"
    return f"{outcome.gigabytes:.2f} GB, {fits}; MFU at most {cap:.1f} %, step {outcome.step_seconds:.2f} s; {seconds}"


def table(outcomes: Sequence[Outcome]) -> str:
    """Returns step time against memory as text, fastest first.

    * marks a program for which no other of its effort is as small and as fast.
    """
    marked = pareto(outcomes)
    lines = [
        f"{'':2}{'effort':<7}{'GB':>7}{'cap, %':>8}{'step, s':>9}{'schedule, s':>13}{'executed/needed':>17}  program"
    ]
    order = {FULL: 0, LOW: 1}
    complete = [outcome for outcome in outcomes if outcome.gigabytes is not None]
    for outcome in sorted(complete, key=lambda o: (order[o.effort], not o.fits, o.seconds_per_example)):
        report = outcome.report
        executed = report["executed_flops_per_chip"] * report["num_chips"] / report["flops"]
        schedule = f"{outcome.scheduled_seconds:.2f}" if outcome.scheduled_seconds else "-"
        mark = "*" if outcome in marked else " " if outcome.fits else "x"
        lines.append(
            f"{mark:2}{outcome.effort:<7}{outcome.gigabytes:>7.2f}"
            f"{100 * report['estimate']['model_flops_utilization']:>8.1f}{outcome.step_seconds:>9.2f}{schedule:>13}"
            f"{executed:>17.3f}  {outcome.candidate.describe()}"
        )
    for outcome in outcomes:
        if outcome.gigabytes is None:
            lines.append(f"x {outcome.effort:<7}{'more':>7}{'':>47}  {outcome.candidate.describe()}")
    return "\n".join(lines)
