"""Data sets on the Hub are converted from their newest commit, and a conversion that resumes keeps its commit."""

import dataclasses
import shutil

import pytest
from huggingface_hub import constants

from alignvlm_jax.data.formats.checks import Limits
from alignvlm_jax.data.prepare import Recipe, in_processes, prepare
from alignvlm_jax.data.store import open_dataset, read_metadata
from alignvlm_jax.errors import UserError
from tests.data.formats.samples import write_images, write_input
from tests.hub_server import forget

NAME = "org/receipts"
HUB = f"hf://datasets/{NAME}"
CONVERT = in_processes(1)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def published(hub, tmp_path):
    """Returns a function that publishes files, and returns the commit."""

    def publish(files):
        return hub.add(NAME, files, kind="datasets")

    return publish


@pytest.fixture
def llava(tmp_path):
    """The files of a data set of nine conversations with images next to them."""
    write_images(tmp_path / "in" / "images", 9)
    file = write_input("llava", tmp_path / "in", 9)
    files = contents(tmp_path / "in")
    name = file.name
    files[f"train{name[name.index('.') :]}"] = files.pop(name)
    return {name.removeprefix("images/"): content for name, content in files.items()}


def run(place, out, name="llava", **options):
    return prepare(Recipe(name, (place,), **options), out, convert=CONVERT, progress=False)


def test_json_and_its_images_are_downloaded_and_converted(hub, published, llava, tmp_path):
    commit = published(llava | {"README.md": b"card", "model.bin": b"no", "dataset_info.json": b"{}"})
    out = tmp_path / "out"
    assert run(HUB, out).accepted == 9 and len(open_dataset(out, "train")) == 9
    assert not {"README.md", "model.bin", "dataset_info.json"} & set(hub.downloads())
    assert read_metadata(out)["recipe"]["inputs"] == [f"{HUB}@{commit}"]


def test_a_finished_conversion_is_recognized_after_the_data_set_and_the_cache_have_changed(
    hub, published, llava, tmp_path, monkeypatch
):
    published(llava)
    out = tmp_path / "out"
    summary = run(HUB, out)
    before = contents(out)
    published({"train.json": b"[]"})
    forget()
    shutil.move(constants.HF_HUB_CACHE, tmp_path / "moved")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "moved"))
    assert run(HUB, out) == summary and contents(out) == before
    with pytest.raises(UserError, match="exists already"):
        run(f"{HUB}@main", out)


def test_an_interrupted_conversion_resumes_with_its_commit(hub, published, llava, tmp_path):
    published(llava)

    def stop(job, tasks):
        raise UserError("stopped")
        yield

    with pytest.raises(UserError, match="stopped"):
        prepare(Recipe("llava", (HUB,)), tmp_path / "out", convert=stop, progress=False)
    published({"train.json": b"[]"})
    forget()
    assert run(HUB, tmp_path / "out").accepted == 9


def test_a_split_a_file_and_a_pattern_are_selected(hub, published, tmp_path):
    names = [f"data/{name}.parquet" for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")]
    files = {}
    for size, name in enumerate([*names, "other/train.parquet"], start=1):
        files[name] = write_input("bigdocs", tmp_path / str(size), size).read_bytes()
    published(files)

    def downloads(place, split="train"):
        hub.requests.clear()
        run(place, tmp_path / place.replace("/", "_"), "bigdocs", split=split)
        return set(hub.downloads())

    assert downloads(f"{HUB}/data", "test") == {names[2]}
    assert downloads(f"{HUB}/data/train-*.parquet") == set(names[:2])
    assert downloads(f"{HUB}/other/train.parquet") == {"other/train.parquet"}
    with pytest.raises(UserError, match="no .parquet files there. .*has data/test"):
        run(f"{HUB}/nothing", tmp_path / "x", "bigdocs")


def test_images_of_another_data_set(hub, published, llava, tmp_path):
    published({"train.json": llava["train.json"]})
    images = {f"pages/{name}": content for name, content in llava.items() if name != "train.json"}
    hub.add("org/pages", images, kind="datasets")
    limits = Limits(image_root="hf://datasets/org/pages/pages")
    assert run(HUB, tmp_path / "out", limits=limits).accepted == 9
    assert read_metadata(tmp_path / "out")["recipe"]["limits"]["image_root"].startswith("hf://datasets/org/pages@")
    with pytest.raises(UserError, match="no images there"):
        run(HUB, tmp_path / "x", limits=dataclasses.replace(limits, image_root="hf://datasets/org/pages/none"))


def test_a_missing_data_set_is_refused(hub, tmp_path):
    with pytest.raises(UserError, match="the Hub has no such data set. Check the spelling"):
        run(HUB, tmp_path / "out")
    assert not (tmp_path / "out").exists()
