"""Benchmarks are downloaded from their known sources, in the layouts that their publishers have on the Hub."""

import io
import json
import pathlib
import tarfile

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import runner, sources
from alignvlm_jax.evaluation.benchmarks.files import image_exists
from alignvlm_jax.evaluation.benchmarks.reading import read_questions
from alignvlm_jax.evaluation.benchmarks.table import BENCHMARKS
from tests.evaluation.benchmarks.stub import StubReader, png
from tests.evaluation.benchmarks.test_layouts import LAYOUTS, write
from tests.hub_server import forget

# The row of `LAYOUTS` that a source has, and the folder there that stands for the repository.
ROWS = {
    "docvqa": ("docvqa-parquet", ""),
    "infovqa": ("infovqa-parquet", "DocVQA"),
    **{name: (f"{name}-docdownstream", "DocDownstream-1.0") for name in ("deepform", "klc", "wtq", "tabfact")},
    "chartqa": ("chartqa-parquet", "ChartQA"),
    "textvqa": ("textvqa-parquet", "textvqa"),
    "tablevqa": ("tablevqa-parquet", "TableVQA-Bench"),
    **{
        f"vcr_{language}_{difficulty}": (
            f"vcr_{language}_{difficulty}-parquet",
            f"VCR-wiki-{language}-{difficulty}-test",
        )
        for language in ("en", "zh")
        for difficulty in ("easy", "hard")
    },
    "mmmu": ("mmmu-parquet", "MMMU"),
    "seed": ("seed-parquet", "SEED-Bench"),
    "mmvet": ("mmvet-parquet", "MMVet"),
    "pope": ("pope-parquet", "POPE"),
    "gqa": ("gqa-parquet", "GQA"),
}


def publish(hub, benchmark: str, folder: pathlib.Path, **options) -> str:
    """Publishes a small version of a benchmark under the name of its source."""
    row, root = ROWS[benchmark]
    write(folder, LAYOUTS[row])
    root = folder / root
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    if "docdownstream" in row:
        # The images are an archive, cut into parts.
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz") as archive:
            for name in [name for name in files if name.startswith("imgs/")]:
                archive.add(root / name, f"./{name}")
                del files[name]
        content = stream.getvalue()
        files |= {"partial-imgs-aa": content[:100], "partial-imgs-ab": content[100:]}
    files |= {"README.md": b"# card", "data/train-00000-of-00001.parquet": b"not fetched"}
    return hub.add(sources.SOURCES[benchmark].repository, files, kind="datasets", **options)


def test_every_benchmark_has_a_source():
    assert set(sources.SOURCES) == set(BENCHMARKS) == set(ROWS)
    assert all(BENCHMARKS[name].split in source.splits for name, source in sources.SOURCES.items())


@pytest.mark.parametrize("name", ROWS)
def test_the_files_of_a_split_are_downloaded_and_read(name, hub, tmp_path, capsys):
    commit = publish(hub, name, tmp_path / "published", license="cc-by-4.0")
    split = BENCHMARKS[name].split
    fetched = sources.fetch({name: split})[name]
    assert fetched.name == f"hf://datasets/{sources.SOURCES[name].repository}@{commit}"
    questions = read_questions(BENCHMARKS[name], fetched.folder, split).questions
    assert questions and not any(question.problem for question in questions)
    assert all(image_exists(image) for question in questions for image in question.images)
    assert not {"README.md", "data/train-00000-of-00001.parquet"} & set(hub.downloads())
    line = capsys.readouterr().err.splitlines()[0]
    assert "bytes" in line or "kB" in line


def test_a_second_run_downloads_and_unpacks_nothing(hub, tmp_path, capsys):
    publish(hub, "deepform", tmp_path / "published", license="apache-2.0")
    fetched = sources.fetch({"deepform": "test"})["deepform"]
    assert "license apache-2.0" in capsys.readouterr().err
    image = next(fetched.folder.glob("imgs/*"))
    image.write_bytes(png(9))
    forget()
    hub.requests.clear()
    assert sources.fetch({"deepform": "test"})["deepform"] == fetched
    assert hub.downloads() == [] and image.read_bytes() == png(9)


def test_a_damaged_archive_leaves_nothing(hub, tmp_path):
    publish(hub, "klc", tmp_path / "published")
    repository = hub.repositories["datasets", "mPLUG/DocDownstream-1.0"]
    files = next(iter(repository.commits.values()))
    repository.commit(files | {"partial-imgs-ab": files["partial-imgs-ab"][:20]})
    with pytest.raises(UserError, match="partial-imgs-aa and its other parts cannot be unpacked"):
        sources.fetch({"klc": "test"})
    assert not list((tmp_path / "hub_cache").rglob("imgs"))


def test_what_cannot_be_fetched_is_named(hub):
    with pytest.raises(UserError, match=r"pope: the split val has no known source on the Hub .test has.*--data"):
        sources.fetch({"pope": "val"})
    hub.add("lmms-lab/POPE", {"other.txt": b""}, kind="datasets")
    with pytest.raises(UserError, match=r"has no files data/test-\*.parquet any more"):
        sources.fetch({"pope": "test"})
    with pytest.raises(UserError, match="the Hub has no such data set"):
        sources.fetch({"mmvet": "test"})


def test_the_scores_record_the_commit(hub, tmp_path, monkeypatch):
    commit = publish(hub, "docvqa", tmp_path / "published")
    monkeypatch.setattr(runner, "load", lambda *args, **options: StubReader(lambda prompt: "a"))
    monkeypatch.setattr(StubReader, "with_views", lambda self, views: self, raising=False)
    json_file = tmp_path / "scores.json"
    runner.evaluate_benchmarks("nano", ["docvqa"], json_file=str(json_file))
    scores = json.loads(json_file.read_text())
    assert scores["data"] == {"docvqa": f"hf://datasets/lmms-lab/DocVQA@{commit}"}
    assert scores["benchmarks"][0]["score"] == 100
