"""Mixtures: the records that each strategy selects, and the errors for mistakes."""

import pytest

from alignvlm_jax.data.formats import json_files, llava
from alignvlm_jax.data.formats.conversation import FormatOptions
from alignvlm_jax.data.formats.mixture import Sampling, read_mixture
from alignvlm_jax.errors import UserError
from tests.data.formats.samples import llava_record, write_json


@pytest.mark.parametrize(
    ("strategy", "amount", "percent", "chosen"),
    [
        ("first", 3, False, [0, 1, 2]),
        ("first", 25, True, [0, 1, 2]),  # of 10, rounded up
        ("end", 2, False, [8, 9]),
        ("end", 50, True, [5, 6, 7, 8, 9]),
        ("first", 99, False, list(range(10))),
        ("random", 100, True, list(range(10))),
        ("end", 0, False, []),
    ],
)
def test_strategies(strategy, amount, percent, chosen):
    assert Sampling(strategy, amount, percent, "a.json").choose(10) == chosen


def test_random_selection_depends_on_the_file_alone():
    first = Sampling("random", 10, True, "a.json").choose(1000)
    assert len(first) == 100 and first == sorted(set(first))
    assert first == Sampling("random", 10, True, "a.json").choose(1000)
    assert first != Sampling("random", 10, True, "b.json").choose(1000)


def test_records_not_selected_by_random_sampling_are_not_read(tmp_path):
    write_json(tmp_path / "a.json", [llava_record(i) for i in range(50)])
    (tmp_path / "mix.yml").write_text("datasets: [{json_path: a.json, sampling_strategy: 'random:20%'}]")
    options = FormatOptions(records_per_shard=3)
    slices = llava.plan([str(tmp_path / "mix.yml")], options)
    assert [piece.records for piece in slices] == [3, 3, 3, 1]
    read = [found.id for piece in slices for found in llava.read(piece, options)]
    expected = Sampling("random", 20, True, "a.json").choose(json_files.count_records(str(tmp_path / "a.json")))
    assert read == [f"r{i}" for i in expected]


def test_the_files_of_a_mixture_are_part_of_the_input(tmp_path):
    write_json(tmp_path / "a.json", [])
    (tmp_path / "mix.yaml").write_text("datasets: [{json_path: a.json}]")
    assert llava.referenced_files([str(tmp_path / "mix.yaml"), "other.json"]) == [str(tmp_path / "a.json")]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("datasets: [", "not valid YAML"),
        ("[1, 2]", "under the name 'datasets'"),
        ("datasets: {}", "under the name 'datasets'"),
        ("datasets: [{path: a.json}]", "data set 1: json_path is missing"),
        ("datasets: [{json_path: a.json, samplng: all}]", "unknown samplng"),
        ("datasets: [{json_path: a.json}, {json_path: b.json}]", "data set 2: no such file: b.json"),
        ("datasets: [{json_path: a.json, sampling_strategy: some}]", "'some'; expected something like 'all'"),
        ("datasets: [{json_path: a.json, sampling_strategy: 'first:101%'}]", "first:101%"),
        ("datasets: [{json_path: a.json, sampling_strategy: 'random:-1'}]", "random:-1"),
    ],
)
def test_mistakes_are_named(tmp_path, content, why):
    write_json(tmp_path / "a.json", [])
    (tmp_path / "mix.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        read_mixture(str(tmp_path / "mix.yaml"))
    assert "mix.yaml" in str(error.value) and why in str(error.value)


def test_python_in_yaml_is_not_run(tmp_path):
    (tmp_path / "mix.yaml").write_text(f"!!python/object/apply:os.mkdir ['{tmp_path}/made']")
    with pytest.raises(UserError, match="not valid YAML"):
        read_mixture(str(tmp_path / "mix.yaml"))
    assert not (tmp_path / "made").exists()


def test_paths_in_a_mixture(tmp_path, monkeypatch):
    """LLaVA-OneVision's mixtures have absolute paths; cockroachdb/cockroach#14435: `~` in a file is not expanded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_json(tmp_path / "a.json", [llava_record(0)])
    mixture = tmp_path / "mix" / "mixture.yaml"
    mixture.parent.mkdir()
    mixture.write_text("datasets:\n  - json_path: ~/a.json\n")
    assert [entry.file for entry in read_mixture(str(mixture))] == [str(tmp_path / "a.json")]
    mixture.write_text("datasets:\n  - json_path: hf://datasets/a/b.json\n")
    with pytest.raises(UserError, match="mixture.yaml: data set 1: hf://datasets/a/b.json is on the Hugging Face Hub"):
        read_mixture(str(mixture))
