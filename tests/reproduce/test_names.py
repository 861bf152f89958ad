"""The part about rare names: its jobs, the pages they train on, and what the report says of made-up answers."""

import dataclasses

import pytest

from alignvlm_jax.analysis.name_answers import NameAnswer
from alignvlm_jax.data.synthetic.names import draw_lexicon, num_documents
from alignvlm_jax.reproduce import recipe
from alignvlm_jax.reproduce.options import Options
from alignvlm_jax.reproduce.part import Results
from alignvlm_jax.reproduce.parts import names
from tests.reproduce.made_up import write_result, write_results

OPTIONS = Options(seeds=2, connectors=("align", "mlp"), vision=(("transcription", "somewhere"),))


def test_jobs_are_align_without_and_with_words_and_mlp():
    jobs = names.jobs(OPTIONS)
    assert [job.name for job in jobs[:3]] == [
        "names/transcription/align/seed0",
        "names/transcription/align/words128-seed0",
        "names/transcription/mlp/seed0",
    ]
    assert len(jobs) == 6 and jobs[1]["words"] == names.EXTRA_WORDS
    # The rates are those of the same trials.
    assert jobs[0].needs == jobs[1].needs != jobs[2].needs
    assert [job.connector for job in names.jobs(dataclasses.replace(OPTIONS, connectors=("mlp",)))] == ["mlp", "mlp"]


def test_every_page_of_names_comes_once(tmp_path):
    config = recipe.experiment(OPTIONS, tmp_path, connector="align", encoder="patches", seed=1)
    mixed = names.mixed(config, 1, 5)
    assert mixed.model.connector.num_extra_words == 5
    plain = dataclasses.replace(mixed.model, connector=dataclasses.replace(mixed.model.connector, num_extra_words=0))
    assert plain == config.model
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


def test_the_report_tells_who_is_better_on_rare_names(tmp_path):
    write_results(OPTIONS, tmp_path, {"align": 0.5, "mlp": 0.7}, only=("names",))
    for job in names.jobs(OPTIONS):
        if job["words"]:
            write_result(tmp_path, job, 0.9)
    results = Results(OPTIONS, tmp_path)
    text = names.section(results, tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| ALIGN") or line.startswith("| MLP")]
    assert [row.split("|")[1].strip() for row in rows] == ["ALIGN", "ALIGN with 128 words of its own", "MLP"]
    assert [float(row.split("|")[2].split()[0]) for row in rows] == pytest.approx([0.5, 0.1, 0.3], abs=0.06)
    assert (tmp_path / "names.svg").is_file()
    assert "missing" not in text
    gap, words = names.claims(results)
    assert gap.startswith("Undecided: ALIGN errs more on rare")  # made up without an effect of rarity
    assert words.startswith("Shows: words of its own")


def test_without_results(tmp_path):
    results = Results(OPTIONS, tmp_path)
    assert "6 of 6 runs are still missing" in names.section(results, tmp_path)
    assert names.claims(results) == []
