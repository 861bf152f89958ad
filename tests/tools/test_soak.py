"""Tests of the soak test's checks, which notice every kind of loss. (`make test-large` runs the soak test itself.)"""

import json

import pytest

from alignvlm_jax.config.experiment import ExperimentConfig
from tools.soaking import report, runs

STEPS = 6


def write_run(folder, notes, losses) -> runs.Run:
    """Writes the journal and the output of a run that took these steps with these losses, and returns the run."""
    folder.mkdir()
    run = runs.Run(folder, ExperimentConfig(), folder / "cache")
    for session in sorted({note["sitting"] for note in notes}):
        run.sessions.append(runs.Session("kill", (1, 1, 1), 1, codes=[-9]))
        lines = [
            f"step {note['step']} captions | loss {losses[note['step']]:.4f} | 80 tokens/s\n"
            for note in notes
            if note["sitting"] == session
        ]
        (folder / f"output{session}.0.txt").write_text("".join(lines))
    (folder / "journal.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    return run


def note(session, step, **changes):
    rows = {str(row): f"step {step} row {row}" for row in range(4)}
    return {
        "sitting": session,
        "step": step,
        "time": float(step),
        "rows": rows,
        "refused": ["a: 1"] * (step == 2),
    } | changes


CLEAN = [note(0, step) for step in range(1, STEPS + 1)]
KILLED = [*(note(0, step) for step in (1, 2, 3, 4)), *(note(1, step) for step in (4, 5, 6))]
LOSSES = {step: 3.0 - 0.1 * step for step in range(1, STEPS + 1)}


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Returns a function that compares a run with the clean run, assuming equal final states."""
    monkeypatch.setattr(runs.Run, "_has_same_end", lambda *_: True)
    clean = write_run(tmp_path / "clean", CLEAN, LOSSES)

    def compare(notes, losses=LOSSES, same_mesh=True):
        run = write_run(tmp_path / "other", notes, losses)
        run.compare(clean, same_mesh)
        return run.lost

    return compare


def test_a_run_that_was_killed_and_lost_nothing(compare):
    assert compare(KILLED) == []


def test_one_of_two_processes_may_be_killed_before_it_writes_its_rows(compare):
    half = note(0, 4, rows={"0": "step 4 row 0", "1": "step 4 row 1"})
    assert compare([*KILLED[:3], half, *KILLED[4:]]) == []


@pytest.mark.parametrize(
    "notes, failure",
    [
        (KILLED[:-1], "step 6 was not taken"),
        ([*KILLED[:-1], note(1, 6, rows=note(1, 5)["rows"])], "step 6 had another batch"),
        ([note(0, 1, refused=["a: 7"]), *KILLED[1:]], "step 1 had another batch"),
        ([KILLED[0], note(0, 2, refused=[]), *KILLED[2:]], "step 2 was not taken"),
    ],
)
def test_losses_of_steps_and_batches_are_noticed(compare, notes, failure):
    assert failure in compare(notes)


@pytest.mark.parametrize(
    "same_mesh, difference, close", [(True, 1e-4, False), (False, 1e-4, True), (False, 1.0, False)]
)
def test_training_losses_are_compared(compare, same_mesh, difference, close):
    assert (compare(KILLED, LOSSES | {5: LOSSES[5] + difference}, same_mesh) == []) == close


def test_the_report_sums_all_rounds():
    stopped = runs.Session("sigterm", (2, 1, 1), 1, from_step=3, steps=4, codes=[75], seconds_to_stop=1.5)
    killed = runs.Session("kill", (1, 1, 1), 1, steps=3, codes=[-9], while_saving=True, damaged="3/meta cut")
    run = {"steps": 6, "largest_loss_difference": 0.0, "sittings": [vars(killed), vars(stopped)]}
    result = {
        "runs": dict.fromkeys(("clean", "same", "another"), run),
        "refused": 2,
        "lost": ["a step"],
        "surprises": [],
        "seconds": 60.0,
    }
    summary = report.summarize([result], ["--minutes", "1"])
    assert summary["kills"] == summary["kills_while_saving"] == summary["damaged"] == summary["sigterms_saved"] == 3
    assert summary["steps_taken"] == 21 and summary["steps_kept"] == 18 and summary["restores"] == 3
    text = report.markdown(summary)
    assert "1 things were lost" in text and "saved within 1.5 s" in text and "**lost**: a step" in text
