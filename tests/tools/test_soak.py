"""The soak's own checks: that a loss of any kind would be noticed. (The soak itself runs in `make test-large`.)"""

import json

import pytest

from alignvlm_jax.config.experiment import ExperimentConfig
from tools.soaking import report, runs

STEPS = 6


def write_run(folder, notes, losses) -> runs.Run:
    """A run of which sittings have left these notes and said these losses."""
    folder.mkdir()
    run = runs.Run(folder, ExperimentConfig(), folder / "cache")
    for sitting in sorted({note["sitting"] for note in notes}):
        run.sittings.append(runs.Sitting("kill", (1, 1, 1), 1, codes=[-9]))
        said = [
            f"step {note['step']} captions | loss {losses[note['step']]:.4f} | 80 tokens/s\n"
            for note in notes
            if note["sitting"] == sitting
        ]
        (folder / f"output{sitting}.0.txt").write_text("".join(said))
    (folder / "journal.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    return run


def note(sitting, step, **changes):
    rows = {str(row): f"step {step} row {row}" for row in range(4)}
    return {
        "sitting": sitting,
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
    """What a comparison with the clean run finds; the final states are taken to be the same."""
    monkeypatch.setattr(runs.Run, "_ends_as", lambda *_: True)
    clean = write_run(tmp_path / "clean", CLEAN, LOSSES)

    def compare(notes, losses=LOSSES, same_mesh=True):
        run = write_run(tmp_path / "other", notes, losses)
        run.compare(clean, same_mesh)
        return run.lost

    return compare


def test_a_run_that_was_killed_and_lost_nothing(compare):
    assert compare(KILLED) == []


def test_of_two_processes_one_may_be_killed_before_it_noted_its_rows(compare):
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
def test_what_is_lost_is_noticed(compare, notes, failure):
    assert failure in compare(notes)


@pytest.mark.parametrize(
    "same_mesh, difference, close", [(True, 1e-4, False), (False, 1e-4, True), (False, 1.0, False)]
)
def test_losses_are_compared(compare, same_mesh, difference, close):
    assert (compare(KILLED, LOSSES | {5: LOSSES[5] + difference}, same_mesh) == []) == close


def test_the_report_adds_up(tmp_path):
    sitting = runs.Sitting("sigterm", (2, 1, 1), 1, from_step=3, steps=4, codes=[75], seconds_to_stop=1.5)
    killed = runs.Sitting("kill", (1, 1, 1), 1, steps=3, codes=[-9], while_saving=True, damaged="3/meta cut")
    of_run = {"steps": 6, "largest_loss_difference": 0.0, "sittings": [vars(killed), vars(sitting)]}
    found = {
        "runs": dict.fromkeys(("clean", "same", "another"), of_run),
        "refused": 2,
        "lost": ["a step"],
        "surprises": [],
        "seconds": 60.0,
    }
    summary = report.summarise([found], ["--minutes", "1"])
    assert summary["kills"] == summary["kills_while_saving"] == summary["damaged"] == summary["sigterms_saved"] == 3
    assert summary["steps_taken"] == 21 and summary["steps_kept"] == 18 and summary["restores"] == 3
    text = report.markdown(summary)
    assert "1 things were lost" in text and "saved within 1.5 s" in text and "**lost**: a step" in text
