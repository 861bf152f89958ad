"""The search over programs: order, skipped candidates, time limit and table, with a compiler and a clock of its own."""

import dataclasses

import pytest

from alignvlm_jax.training.compile_candidates import Candidate
from alignvlm_jax.training.compile_search import FULL, LOW, Outcome, best, pareto, search, table

KEPT = ("full", "attention_out", "attention_out,qkv")


def candidate(remat="full", fsdp=4):
    return Candidate(1, fsdp, 1, 1, remat, "full", 1024, 10)


def report(gigabytes=8.0, seconds=2.0, fits=True, scheduled=None, compile_seconds=60.0):
    return {
        "fits": fits,
        "per_chip_bytes": gigabytes * 1e9,
        "compile_seconds": compile_seconds,
        "examples": 100,
        "executed_flops_per_chip": 2.0,
        "num_chips": 4,
        "flops": 6.0,
        "estimate": {
            "step_seconds_if_all_overlaps": seconds,
            "model_flops_utilization": 1 / seconds,
            **({"step_seconds_by_schedule": scheduled} if scheduled else {}),
        },
    }


class FakeCompiler:
    """Compiler that knows the reports, and moves its clock by the time that a program takes."""

    def __init__(self, reports, full_seconds=200.0):
        self.reports, self.full_seconds, self.now, self.calls = reports, full_seconds, 0.0, []

    def clock(self):
        return self.now

    def __call__(self, candidate, effort, seconds):
        self.calls.append((candidate, effort))
        report = dict(self.reports[candidate])
        if effort == FULL:
            report["compile_seconds"] = self.full_seconds
        self.now += min(seconds, report.get("compile_seconds", 1.0))
        return report if report.get("compile_seconds", 1.0) <= seconds else None

    def search(self, ranked, **options):
        self.lines = []
        defaults = dict(minutes=60, num_candidates=9, num_finalists=1, clock=self.clock, log=self.lines.append)
        return search(ranked, self, **{**defaults, **options})


def test_the_best_at_low_effort_are_compiled_at_full_effort():
    meshes = [candidate(fsdp=fsdp) for fsdp in (1, 2, 4)]
    # The compiler's own schedule at full effort decides, not the bound that low effort gives.
    reports = [report(seconds=2.0, scheduled=5.0), report(seconds=9.0), report(seconds=3.0, scheduled=4.0)]
    compiler = FakeCompiler(dict(zip(meshes, reports, strict=True)))
    outcomes = compiler.search(meshes, num_finalists=2)
    assert compiler.calls == [(c, LOW) for c in meshes] + [(meshes[0], FULL), (meshes[2], FULL)]
    assert best(outcomes).candidate == meshes[2]
    assert best(outcomes[:3]).candidate == meshes[0]
    assert best([]) is None


def test_what_cannot_fit_and_what_cannot_be_faster_is_not_compiled():
    least, more, most = (candidate(remat) for remat in KEPT)
    other = candidate(KEPT[2], fsdp=2)
    compiler = FakeCompiler({least: report(), more: report(fits=False), most: report(), other: report()})
    compiler.search([more, most, least, other], num_finalists=0)
    assert [c for c, _ in compiler.calls] == [more, least, other]
    assert any("does not fit" in line and "skipped" in line for line in compiler.lines)
    compiler = FakeCompiler({least: report(), more: report(), most: report()})
    compiler.search([more, least, most], num_finalists=0)
    assert [c for c, _ in compiler.calls] == [more, most]


def test_a_failure_is_an_outcome_that_rules_nothing_out():
    least, more, _ = (candidate(remat) for remat in KEPT)
    compiler = FakeCompiler({least: {"error": "exit code -6: Check failed"}, more: report()})
    outcomes = compiler.search([least, more], num_finalists=0)
    assert [outcome.fits for outcome in outcomes] == [False, True]
    assert "  failed: exit code -6: Check failed" in compiler.lines


@pytest.mark.parametrize(
    "minutes, calls",
    [
        (60, [LOW] * 4 + [FULL] * 2),
        # After a program of one minute, a minute at low effort and three at full effort are expected.
        (4.9, [LOW] + [FULL]),
        (6.5, [LOW] * 3 + [FULL]),
        (0.5, [LOW]),  # stopped
        (0, []),
    ],
)
def test_the_time_limit_is_kept(minutes, calls):
    found = [candidate(fsdp=fsdp) for fsdp in (1, 2, 4, 8)]
    compiler = FakeCompiler({c: report() for c in found})
    outcomes = compiler.search(found, minutes=minutes, num_finalists=2)
    assert [effort for _, effort in compiler.calls] == calls
    assert compiler.now <= 60 * minutes
    assert len(outcomes) == (0 if minutes < 1 else len(calls))


def test_several_programs_at_the_same_time_give_the_same_outcomes():
    found = [candidate(fsdp=fsdp) for fsdp in (1, 2, 4, 8)]
    reports = {c: report(seconds=c.fsdp) for c in found}
    one, two = (FakeCompiler(reports).search(found, jobs=jobs, minutes=999) for jobs in (1, 2))
    assert {(o.candidate, o.effort) for o in one} == {(o.candidate, o.effort) for o in two}
    assert best(two).candidate == found[0]


def test_the_table_shows_time_against_memory():
    outcomes = [
        Outcome(candidate("attention_out"), LOW, report(10.0, 2.0)),
        Outcome(candidate("full"), LOW, report(6.0, 3.0)),
        Outcome(candidate("full", fsdp=2), LOW, report(7.0, 3.0)),
        Outcome(candidate("none"), LOW, {**report(fits=False), "per_chip_bytes": None}),
        Outcome(candidate("attention_out"), FULL, report(9.5, 2.0, scheduled=2.5)),
    ]
    assert pareto(outcomes) == [outcomes[0], outcomes[1], outcomes[4]]
    lines = table(outcomes).splitlines()
    assert lines[1].split()[:7] == ["*", "full", "9.50", "50.0", "2.00", "2.50", "1.333"]
    assert [line[0] for line in lines[1:]] == ["*", "*", "*", " ", "x"]
    assert "remat=none/full" in lines[-1]
    assert dataclasses.replace(outcomes[0], effort=FULL).scheduled_seconds is None
