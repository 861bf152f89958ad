"""Tests that the report follows the results, whatever they are, and names what is missing."""

import pytest

from alignvlm_jax.reproduce import parts
from alignvlm_jax.reproduce.jobs import OVER_TIME
from alignvlm_jax.reproduce.options import Options
from alignvlm_jax.reproduce.part import Results
from alignvlm_jax.reproduce.parts import accuracy, tuning
from alignvlm_jax.reproduce.report import claims, write_report
from tests.reproduce.fake_results import write_result, write_results

OPTIONS = Options(seeds=3, connectors=("align", "mlp", "ovis"), vision=(("transcription", "somewhere"),))


def test_without_results(tmp_path):
    text = write_report(OPTIONS, tmp_path).read_text()
    assert "No verdict is possible yet" in text
    assert "18 of 18 runs are still missing" in text  # in the main table: 3 connectors, 2 encoders, 3 seeds
    assert not list(tmp_path.glob("*.svg"))


@pytest.mark.parametrize(
    ("align", "mlp", "verdict"), [(0.8, 0.2, "Confirmed"), (0.2, 0.8, "Contradicted"), (0.5, 0.5, "Undecided")]
)
def test_the_verdict_follows_the_results(tmp_path, align, mlp, verdict):
    write_results(OPTIONS, tmp_path, {"align": align, "mlp": mlp, "ovis": 0.5})
    lines = claims(Results(OPTIONS, tmp_path)).splitlines()
    about_mlp = [line for line in lines if line.startswith("- ") and "MLP" in line]
    assert len(about_mlp) == 2 + 2 + 2 + 2 + 1  # accuracy, noise, low resource, restoration, cost
    accuracy_lines = [line for line in about_mlp if "answers more questions than MLP (" in line]
    assert [line.startswith(f"- {verdict}: ") for line in accuracy_lines] == [True, True]
    restoration_lines = [line for line in about_mlp if "ALIGN restores more covered answers" in line]
    assert [line.startswith(f"- {verdict}: ") for line in restoration_lines] == [True, True]


def test_every_part_has_its_table_and_its_plot(tmp_path):
    write_results(OPTIONS, tmp_path, {"align": 0.8, "mlp": 0.2, "ovis": 0.5})
    text = write_report(OPTIONS, tmp_path).read_text()
    for part in parts.PARTS:
        assert f"\n## {part.title}\n" in text
    plots = ("accuracy", "learning", "noise", "low_resource", "vocabulary", "restoration", "names")
    assert sorted(file.stem for file in tmp_path.glob("*.svg")) == sorted(plots)
    assert all(f"({name}.svg)" in text for name in plots)
    assert "missing" not in text
    row = next(line for line in text.splitlines() if line.startswith("| ALIGN | 0."))
    # The scores of the three seeds are listed, and their mean is the score.
    seeds = [float(value) for value in row.split("|")[3].split(",")]
    assert len(seeds) == 3 and float(row.split("|")[2].split()[0]) == pytest.approx(sum(seeds) / 3, abs=1e-3)


def test_runs_that_ran_out_of_time_are_named_and_excluded(tmp_path):
    jobs = write_results(OPTIONS, tmp_path, {"align": 0.8, "mlp": 0.2, "ovis": 0.5})
    stopped = next(job for job in jobs if job.part == "accuracy" and job.connector == "mlp" and job.seed == 1)
    before = accuracy.section(Results(OPTIONS, tmp_path), tmp_path)
    write_result(tmp_path, stopped, 1.0, status=OVER_TIME)
    text = accuracy.section(Results(OPTIONS, tmp_path), tmp_path)
    assert f"Stopped at the time limit and excluded: {stopped.name} (step 350)." in text
    rows = [next(line for line in section.splitlines() if line.startswith("| MLP |")) for section in (before, text)]
    assert [len(row.split("|")[3].split(",")) for row in rows] == [3, 2]


def test_the_factor_with_the_lowest_validation_loss_is_chosen(tmp_path):
    write_results(OPTIONS, tmp_path, {"align": 0.8, "mlp": 0.2, "ovis": 0.5}, only=("tuning",))
    assert tuning.chosen_factor(tmp_path, "mlp", "patches") == 1.0
    trial = next(trial for trial in tuning.trials("mlp", "patches") if trial["factor"] == 4.0)
    write_result(tmp_path, trial, 3.0)  # a loss below all others
    assert tuning.chosen_factor(tmp_path, "mlp", "patches") == 4.0
    assert tuning.chosen_factor(tmp_path, "mlp", "transcription") == 1.0
