"""Tests of the list of jobs and its order, which depend only on the options."""

import dataclasses

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.reproduce import parts
from alignvlm_jax.reproduce.jobs import COMPLETE, OVER_TIME, is_done
from alignvlm_jax.reproduce.options import Options

OPTIONS = Options(seeds=3)


def test_the_list_of_jobs():
    jobs = parts.all_jobs(OPTIONS)
    assert jobs == parts.all_jobs(OPTIONS)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    count = {part.name: sum(job.part == part.name for job in jobs) for part in parts.PARTS}
    assert count == {
        "accuracy": 6 * 2 * 3,
        "tuning": 6 * 2 * 4,
        "noise": 6 * 2 * 3,
        "low_resource": 3 * 2 * 3,
        "vocabulary": 2 * 3,
        "restoration": 6 * 3,
        "names": 4 * 3,
        "cost": 6,
    }


def test_every_connector_has_the_same_number_of_trials():
    trials = [job for job in parts.all_jobs(OPTIONS) if job.part == "tuning"]
    factors_by_connector = {
        (job.connector, job.encoder): sorted(other["factor"] for other in trials if other.connector == job.connector)
        for job in trials
    }
    assert len({tuple(factors) for factors in factors_by_connector.values()}) == 1


def test_jobs_come_after_their_needs_and_first_seeds_before_second_ones():
    jobs = parts.all_jobs(OPTIONS)
    position = {job.name: index for index, job in enumerate(jobs)}
    assert all(position[need] < position[job.name] for job in jobs for need in job.needs)
    last_of_first = max(position[job.name] for job in jobs if job.seed == 0)
    assert last_of_first < min(position[job.name] for job in jobs if job.seed == 1)
    # A run that is stopped after the first table has a result for every connector on the fair encoder.
    main = [job for job in jobs if job.part == "accuracy"]
    assert {job.connector for job in main[:6]} == set(OPTIONS.connectors)
    assert {job.encoder for job in main[:6]} == {"transcription"}


def test_more_seeds_and_connectors_only_add():
    few = parts.all_jobs(dataclasses.replace(OPTIONS, seeds=1, connectors=("align", "mlp")))
    assert set(few) < set(parts.all_jobs(OPTIONS))


def test_selected_parts_bring_the_jobs_they_need():
    jobs = parts.all_jobs(dataclasses.replace(OPTIONS, seeds=1, encoders=("patches",)), ["vocabulary"])
    assert [job.part for job in jobs] == ["tuning"] * 4 + ["accuracy", "vocabulary"]
    with pytest.raises(UserError, match="no part 'nosie'"):
        parts.all_jobs(OPTIONS, ["nosie"])
    with pytest.raises(UserError, match="no connector 'mpl'"):
        parts.all_jobs(dataclasses.replace(OPTIONS, connectors=("align", "mpl")))


def test_jobs_that_are_done():
    assert not is_done(None, 3.0)
    assert is_done({"status": COMPLETE, "minutes": 1.0}, 3.0)
    assert is_done({"status": OVER_TIME, "minutes": 3.0}, 3.0)
    assert not is_done({"status": OVER_TIME, "minutes": 3.0}, 4.0)


def test_options_of_a_folder_are_kept(tmp_path):
    OPTIONS.save(tmp_path)
    assert Options.load(tmp_path) == OPTIONS
    more = dataclasses.replace(OPTIONS, seeds=5, minutes=4.0)
    more.save(tmp_path)
    assert Options.load(tmp_path) == more
    with pytest.raises(UserError, match="questions None, got 100"):
        dataclasses.replace(OPTIONS, questions=100).save(tmp_path)
