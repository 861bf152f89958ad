"""Groups of records that show the same images: found once, stored, and the same from any number of shares."""

import os

import numpy as np
import pytest

from alignvlm_jax.data import groups, store
from alignvlm_jax.data.prepare import FEATURES
from tests.data.pages import page, png_image, prepared, turn


def _records():
    """Returns records that show the images a, b, none, a, (a b), none, (b a), (a b)."""
    a, b = png_image(1, (20, 20)), png_image(2, (20, 20))
    shown = [[a], [b], [], [a], [a, b], [], [b, a], [a, b]]
    return [
        prepared(i, turn("What?", "this", len(images))) | {"images": images, "id": f"r{i}"}
        for i, images in enumerate(shown)
    ]


def test_records_with_the_same_images_in_the_same_order_are_a_group():
    records = _records()
    same = groups.match(groups.scan(records, range(len(records))))
    assert same.first.tolist() == [0, 1, 2, 0, 4, 5, 6, 4]
    found = groups.make_groups(same, "conversation", "tree", 32)
    assert [found[i] for i in range(len(found))] == [[0, 3], [1], [2], [4, 7], [5], [6]] and found.num_questions == 8


def test_shares_of_several_processes_give_the_same_groups():
    records = _records()
    whole = groups.scan(records, range(8))
    parts = [groups.scan(records, range(start, stop)) for start, stop in ((0, 3), (3, 3), (3, 8))]
    for field, *shares in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(field, np.concatenate(shares))


def test_large_groups_are_split_into_parts_of_similar_size():
    same = groups.SameImages(np.zeros(50, np.int32), np.ones(50, np.int32))
    found = groups.make_groups(same, "conversation", "tree", 8)
    sizes = [len(found[i]) for i in range(len(found))]
    assert sum(sizes) == 50 and max(sizes) <= 8 and min(sizes) >= 7
    assert [i for group in range(len(found)) for i in found[group]] == list(range(50))
    # Questions count, not records; a record with more than fit stays whole.
    same = groups.SameImages(np.array([0, 0, 0, 0, 4]), np.array([3, 3, 20, 1, 2]))
    found = groups.make_groups(same, "qa", "tree", 8)
    assert [found[i] for i in range(len(found))][-1] == [4] and found.num_questions == 29
    assert groups.make_groups(same, "mixed", "tree", 99).num_questions == 17
    assert groups.make_groups(same, "qa", "conversation", 99).num_questions == 5


def test_questions_of_pages_are_counted():
    records = [page(i, np.random.default_rng(i)) for i in range(6)]
    scan = groups.scan(records, range(6))
    assert scan.questions.tolist() == [len(record["questions"]) for record in records]


@pytest.mark.parametrize("is_writable", [True, False])
def test_result_is_stored_with_the_data_or_in_the_cache_of_the_user(tmp_path, monkeypatch, is_writable):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store.write_dataset(tmp_path / "data", FEATURES, {"train": _records()})
    source = store.open_dataset(tmp_path / "data", "train")
    assert groups.cached(source.folder, source.identity) is None
    same = groups.match(groups.scan(source, range(len(source))))
    if not is_writable:  # root may write to any folder, so the folder is missing
        os.rename(tmp_path / "data", tmp_path / "away")
        (tmp_path / "data").write_text("a file")
    groups.store_cache(source.folder, source.identity, same)
    stored = groups.cached(source.folder, source.identity)
    np.testing.assert_array_equal(stored.first, same.first)
    assert bool(list((tmp_path / "cache").rglob("*.npz"))) != is_writable
    # Other records have another identity; a damaged file counts as none.
    if is_writable:
        assert store.open_dataset(tmp_path / "data", "train[:4]").identity != source.identity
        (file,) = (tmp_path / "data").glob("*.npz")
        file.write_bytes(file.read_bytes()[:-30])
        assert groups.cached(source.folder, source.identity) is None
        assert len(store.open_dataset(tmp_path / "data", "train")) == 8
