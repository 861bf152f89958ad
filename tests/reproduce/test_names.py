"""Tests of the part about rare names: its jobs, the pages they train on, and its section on fake answers."""

import dataclasses

import pytest

from alignvlm_jax.analysis.rare_names.kinds import NameAnswer
from alignvlm_jax.data.synthetic.names import draw_lexicon, num_documents
from alignvlm_jax.reproduce import recipe
from alignvlm_jax.reproduce.options import Options
from alignvlm_jax.reproduce.part import Results
from alignvlm_jax.reproduce.parts import names
from tests.reproduce.fake_results import write_result, write_results

OPTIONS = Options(seeds=2, connectors=("align", "mlp"), vision=(("transcription", "somewhere"),))


def test_jobs_are_align_and_mlp_with_one_view_and_several():
    jobs = names.jobs(OPTIONS)
    assert [job.name for job in names.closed_jobs(OPTIONS)] == [
        f"names/transcription/align/words128-seed{seed}" for seed in range(2)
    ]
    align, align_views, mlp, mlp_views = jobs[:4]
    assert [job.name for job in jobs[:4]] == [
        "names/transcription/align/seed0",
        "names/transcription/align/views4-seed0",
        "names/transcription/mlp/seed0",
        "names/transcription/mlp/views4-seed0",
    ]
    assert len(jobs) == 8 and align_views["variant"].views == names.VIEWS
    # Several views are measured on the model that was trained with one view.
    assert align.needs != mlp.needs
    assert align_views.needs == (align.name,) and mlp_views.needs == (mlp.name,) and align_views.needs_weights
    alone = names.jobs(dataclasses.replace(OPTIONS, connectors=("mlp",)))
    assert [job.name for job in alone] == [job.name for job in jobs if job.connector == "mlp"]


def test_a_job_with_several_views_asks_the_trained_model(monkeypatch, tmp_path):
    asked = []

    class Reader:
        num_views = 1

        def with_views(self, number):
            self.num_views = number
            return self

    class FakeWork:
        options, out, data, job = OPTIONS, tmp_path, tmp_path / "data", names.jobs(OPTIONS)[5]

        def reader(self, job):
            asked.append(job.name)
            return Reader()

        def records(self, split):
            return split

        def score(self, reader, records, limit):
            return {"views": reader.num_views, "records": records}

    def ask_names(reader, folder, limit):
        asked.append((reader.num_views, folder.name))
        return []

    monkeypatch.setattr(names, "ask_names", ask_names)
    found = names.run(FakeWork())
    assert asked == ["names/transcription/align/seed1", (4, "names-1")]
    assert found == {"answers": [], "documents": {"views": 4, "records": "heldout"}}


def test_every_page_of_names_comes_once(tmp_path):
    config = recipe.experiment(OPTIONS, tmp_path, connector="align", encoder="patches", seed=1)
    mixed = names.mixed(config, 1)
    assert mixed.model == config.model
    pages, end = num_documents("train", names.GROUPS), 0
    for stage, before in zip(mixed.stages, config.stages, strict=True):
        ordinary, some = stage.mixture
        assert dataclasses.replace(ordinary, weight=1.0) == before.mixture[0]
        assert some.dataset == "names-1" and some.task == ordinary.task and ordinary.weight + some.weight == 1
        start, stop = (int(text) for text in some.split.removeprefix("train[").removesuffix("]").split(":"))
        assert start == end and stop - start == pytest.approx(some.weight * recipe.pages_seen((stage,)), abs=1)
        end = stop
    assert end == pages


def test_answers_are_kept_in_lines():
    lexicon = draw_lexicon(1, names.GROUPS)
    one, other = lexicon[0], lexicon[-1]
    answers = [NameAnswer("p", one, one.text, "right", "K"), NameAnswer("p", other, "a\tb\n c", "garble")]
    back = names.unpack(names.pack(answers), 1)
    assert [(answer.name.text, answer.kind, answer.letter) for answer in back] == [
        (one.text, "right", "K"),
        (other.text, "garble", None),
    ]
    assert back[1].predicted == "a b c"
    assert back[0].name.group == one.group + names.GROUPS, "groups of two seeds are not the same"


def test_the_report_tells_which_model_is_better_on_rare_names(tmp_path):
    write_results(OPTIONS, tmp_path, {"align": 0.5, "mlp": 0.7}, only=("names",))
    # Runs with words of ALIGN's own are no longer done, but results of earlier versions are still reported.
    for job in [*names.jobs(OPTIONS), *names.closed_jobs(OPTIONS)]:
        if job["variant"].words or job["variant"].views > 1:
            write_result(tmp_path, job, 0.9 if job.connector == "align" else 0.7)
    results = Results(OPTIONS, tmp_path)
    text = names.section(results, tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| ALIGN") or line.startswith("| MLP")]
    titles = ["ALIGN", "ALIGN with 128 words of its own", "ALIGN, 4 views", "MLP", "MLP, 4 views"]
    assert [row.split("|")[1].strip() for row in rows] == titles
    assert [float(row.split("|")[2].split()[0]) for row in rows] == pytest.approx([0.5, 0.1, 0.1, 0.3, 0.3], abs=0.06)
    assert [row.count("as with one") for row in rows] == [0, 0, 2, 0, 2]
    *_, comparisons = text.partition("](names.svg)")
    compared = [line[2:].split(": ")[0] for line in comparisons.splitlines() if line.startswith("- ")]
    assert compared == [*(f"{title} minus ALIGN" for title in titles[1:4]), "MLP, 4 views minus MLP"]
    assert (tmp_path / "names.svg").is_file()
    assert "missing" not in text
    gap, words, views = names.claims(results)
    assert gap.startswith("Undecided: ALIGN's error is larger on rare")  # the fake results have no effect of rarity
    assert words.startswith("Confirmed: words of its own")
    assert views.startswith("Confirmed: 4 views of each page")


def test_without_results(tmp_path):
    results = Results(OPTIONS, tmp_path)
    assert "8 of 8 runs are still missing" in names.section(results, tmp_path)
    assert names.claims(results) == []
