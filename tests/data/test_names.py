"""Names of known rarity: the counts hold, rarity is random, and names of a group differ in nothing else."""

import collections

import numpy as np
import pytest
import tensorflow_datasets as tfds

from alignvlm_jax.data import store
from alignvlm_jax.data.edit_distance import edit_distance
from alignvlm_jax.data.synthetic import draw_document, names, split_of
from alignvlm_jax.data.synthetic.names import COUNTS, LOOK_ALIKE, draw_lexicon, draw_names_document
from alignvlm_jax.errors import UserError

SEED, GROUPS = 0, 6


@pytest.fixture(scope="module")
def lexicon():
    return draw_lexicon(SEED, GROUPS)


@pytest.fixture(scope="module")
def pages():
    """All pages of each split, without their images."""
    return {
        split: [
            draw_names_document(SEED, split, index, groups=GROUPS, render=False)
            for index in range(names.num_documents(split, GROUPS))
        ]
        for split in ("train", "heldout")
    }


def test_groups_have_each_count_once_and_are_look_alikes_or_loners(lexicon):
    assert len({name.text for name in lexicon}) == GROUPS * len(COUNTS)
    for group in range(GROUPS):
        members = [name for name in lexicon if name.group == group]
        assert sorted(name.seen for name in members) == list(COUNTS)
        assert len({len(name.text) for name in members}) == 1
        assert {name.has_look_alikes for name in members} == {group < GROUPS // 2}
    for name in lexicon:
        for other in lexicon:
            alike = name.has_look_alikes and name.group == other.group and name != other
            distance = edit_distance(name.text, other.text)
            assert distance == 1 if alike else name == other or distance > LOOK_ALIKE


def test_rarity_is_random():
    """The alphabetical position of the letter that tells look-alikes apart is not related to how common a name is."""
    ranks = []
    for seed in range(40):
        texts = {name.seen: name.text for name in draw_lexicon(seed, GROUPS) if name.group == 0}
        ranks.append(sorted(texts.values()).index(texts[256]))
    assert min(np.bincount(ranks, minlength=6)) >= 1 and abs(np.mean(ranks) - 2.5) < 1


def test_names_are_printed_and_asked_for_as_often_as_stated(lexicon, pages):
    for split, documents in pages.items():
        printed = collections.Counter(word for document in documents for word in document.transcription.split())
        asked = collections.Counter(answer for document in documents for answer in document.answers)
        for name in lexicon:
            wanted = name.seen if split == "train" else 12
            assert printed[name.text] == asked[name.text] == wanted, name


def test_names_of_a_page_are_of_different_groups(lexicon, pages):
    group = {name.text: name.group for name in lexicon}
    together = collections.Counter()
    for document in pages["train"]:
        found = [group[answer] for answer in document.answers if answer in group]
        assert len(found) == len(set(found)) == 3
        together.update([tuple(sorted(found))])
    assert len(together) > 3  # no group always comes with the same others


def test_ordinary_training_documents_print_no_lexicon_names(lexicon):
    """Neither do held-out ones, so mixing the corpora keeps held-out values held out."""
    texts = {name.text for name in draw_lexicon(0, 24)} | {name.text for name in lexicon}
    assert {split_of(text) for text in texts} == {"validation"}
    for index in range(200):
        for split in ("train", "heldout"):
            document = draw_document(0, split, index, render=False)
            assert texts.isdisjoint(document.transcription.split())


def test_a_page_is_a_function_of_its_id():
    drawn = draw_names_document(3, "heldout", 5, groups=GROUPS)
    again = names.redraw(drawn.id, GROUPS)
    assert again.glyphs == drawn.glyphs and again.questions == drawn.questions and again.image is None
    assert drawn.image.size == drawn.size
    assert draw_names_document(4, "heldout", 5, groups=GROUPS).transcription != drawn.transcription


def test_a_corpus_keeps_its_lexicon(tmp_path, lexicon):
    options = dict(groups=GROUPS, splits=("validation", "heldout"), progress=False, processes=1)
    folder = names.build_names_corpus(tmp_path / "names", **options)
    assert names.read_lexicon(folder) == lexicon
    assert [len(store.open_dataset(folder, split)) for split in ("validation", "heldout")] == [48, 144]
    written = (folder / "dataset_info.json").stat().st_mtime_ns
    names.build_names_corpus(folder, **options)
    assert (folder / "dataset_info.json").stat().st_mtime_ns == written


def test_mistakes_are_reported(tmp_path):
    with pytest.raises(UserError, match="multiple of 6, got 4"):
        draw_lexicon(0, 4)
    features = {"id": tfds.features.Text()}
    store.write_dataset(tmp_path / "other", features, {"train": [{"id": "a"}]})
    with pytest.raises(UserError, match="no corpus of names"):
        names.read_lexicon(tmp_path / "other")
