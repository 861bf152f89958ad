"""Records in ArrayRecord are read back unchanged, without TensorFlow; a folder holds a complete data set or none."""

import io
import pickle
import subprocess
import sys

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from alignvlm_jax.data import store
from alignvlm_jax.data.store import open_dataset, read_metadata, write_dataset
from alignvlm_jax.data.synthetic import draw_document
from alignvlm_jax.data.synthetic.corpus import build_corpus
from alignvlm_jax.data.synthetic.records import draw_records
from alignvlm_jax.errors import UserError
from alignvlm_jax.leases.lease import InUseError
from alignvlm_jax.leases.one_writer import one_writer

SIZES = {"train": 70, "validation": 5, "heldout": 6}
FEATURES = {"name": tfds.features.Text(), "words": tfds.features.Sequence(tfds.features.Text())}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("data") / "corpus", seed=1, sizes=SIZES, progress=False)


def test_records_are_read_back_unchanged_and_in_order(corpus):
    for split, size in SIZES.items():
        source = open_dataset(corpus, split)
        assert len(source) == size
        assert [source[i] for i in range(size)] == draw_records(1, split, 0, size)


def test_iteration_ends_after_the_last_record(corpus):
    source = open_dataset(corpus, "heldout")
    assert [record["id"] for record in source] == [source[i]["id"] for i in range(6)]
    for index in (-1, 6):
        with pytest.raises(IndexError, match=f"record {index}: expected 0 to 5"):
            source[index]


def test_images_stay_encoded(corpus):
    encoded = open_dataset(corpus, "heldout")[3]["image"]
    assert isinstance(encoded, bytes)
    assert np.array_equal(Image.open(io.BytesIO(encoded)), draw_document(1, "heldout", 3).image)


def test_grain_reads_records_in_any_order_and_in_other_processes(corpus):
    source = open_dataset(corpus, "train")
    shuffled = grain.MapDataset.source(source).shuffle(seed=4).map(lambda record: record["id"])
    ids = [source[i]["id"] for i in range(70)]
    in_turn = [shuffled[i] for i in range(70)]
    assert in_turn != ids and sorted(in_turn) == sorted(ids)
    assert pickle.loads(pickle.dumps(source))[2] == source[2]


def test_tfds_opens_the_data_set(corpus):
    builder = tfds.builder_from_directory(str(corpus))
    assert builder.info.file_format.value == "array_record"
    assert builder.as_data_source("train")[0]["image"].ndim == 3


def test_tensorflow_is_not_needed(corpus):
    program = (
        "import sys; from alignvlm_jax.data.store import open_dataset;"
        f"open_dataset({str(corpus)!r}, 'train')[0]; print('tensorflow' in sys.modules, 'matplotlib' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


def test_two_processes_draw_the_same_corpus_as_one(corpus, tmp_path):
    other = build_corpus(tmp_path / "corpus", seed=1, sizes=SIZES, progress=False, processes=2)
    for split, size in SIZES.items():
        ours, theirs = open_dataset(corpus, split), open_dataset(other, split)
        assert all(ours[i] == theirs[i] for i in range(size))


def test_corpus_is_drawn_again_only_for_other_parameters(tmp_path):
    folder = tmp_path / "corpus"
    build_corpus(folder, seed=1, sizes={"train": 3}, progress=False)

    def written():
        """Returns what changes when the file is written, but not when it is read."""
        status = (folder / "dataset_info.json").stat()
        return status.st_ino, status.st_mtime_ns

    first = written()
    build_corpus(folder, seed=1, sizes={"train": 3}, progress=False)
    assert written() == first
    build_corpus(folder, seed=2, sizes={"train": 4}, progress=False)
    assert [record["id"] for record in map(open_dataset(folder, "train").__getitem__, range(4))] == [
        f"synthetic-2-train-{i}" for i in range(4)
    ]


def test_other_data_sets_are_not_overwritten(tmp_path):
    write_dataset(tmp_path / "real", FEATURES, {"train": [{"name": "a", "words": []}]})
    with pytest.raises(UserError, match="another kind"):
        build_corpus(tmp_path / "real", seed=1, sizes={"train": 1}, progress=False)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    with pytest.raises(UserError, match="not a data set"):
        build_corpus(tmp_path / "notes", seed=1, sizes={"train": 1}, progress=False)
    with pytest.raises(UserError, match="exists already"):
        write_dataset(tmp_path / "notes", FEATURES, {"train": []})
    assert (tmp_path / "notes" / "todo.txt").read_text() == "mine"


def test_interrupted_write_leaves_nothing(tmp_path):
    def records():
        yield {"name": "a", "words": ["b"]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "data", FEATURES, {"train": records()})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data.partial").mkdir()  # left by a killed run
    (tmp_path / "data.partial" / "half.array_record").write_text("")
    write_dataset(tmp_path / "data", FEATURES, {"train": [{"name": "a", "words": ["b"]}]})
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert not (tmp_path / "data" / "half.array_record").exists() and len(open_dataset(tmp_path / "data", "train")) == 1


def test_records_of_any_shape(tmp_path):
    records = [{"name": "Grüße\n", "words": []}, {"name": "", "words": ["one", "", "zwei ✓"]}]
    write_dataset(tmp_path / "data", FEATURES, {"train": records}, metadata={"licence": "none"})
    source = open_dataset(tmp_path / "data", "train")
    assert [source[0], source[1]] == records
    assert read_metadata(tmp_path / "data") == {"licence": "none"}


def test_mistakes_are_named(corpus, tmp_path):
    with pytest.raises(UserError, match="'test'.*heldout, train, validation"):
        open_dataset(corpus, "test")
    with pytest.raises(UserError, match="nowhere is not a data set"):
        open_dataset(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="'all' cannot be the name"):
        write_dataset(tmp_path / "data", FEATURES, {"all": []})
    with pytest.raises(UserError, match="sizes: no split 'test'"):
        build_corpus(tmp_path / "corpus", seed=1, sizes={"test": 3})
    with pytest.raises(UserError, match=r"sizes\.train: .* got 0"):
        build_corpus(tmp_path / "corpus", seed=1, sizes={"train": 0})


@pytest.fixture
def four_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_RECORDS_PER_SHARD", 10)
    records = [{"name": f"{i}", "words": [f"{i} " * 200]} for i in range(40)]
    write_dataset(tmp_path / "data", FEATURES, {"train": records})
    return tmp_path / "data"


@pytest.mark.parametrize("damaged, without", [(0, "train[10:]"), (1, "train[:10]+train[20:]"), (3, "train[:30]")])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_damaged_shard_is_named_with_the_split_without_it(four_shards, damaged, without, how):
    files = sorted(four_shards.glob("*array_record*"))
    assert len(files) == 4
    data = bytearray(files[damaged].read_bytes())
    if how == "truncated":
        files[damaged].write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        data[len(data) // 2] ^= 0x10
        files[damaged].write_bytes(data)
    else:
        files[damaged].unlink()
        with pytest.raises(UserError, match="1 of 4 shards is missing") as error:
            open_dataset(four_shards, "train")
        assert files[damaged].name in str(error.value) and f"split='{without}'" in str(error.value)
        rest = open_dataset(four_shards, without)
        assert [rest[i]["name"] for i in range(len(rest))] == [f"{i}" for i in range(40) if i // 10 != damaged]
        return
    source, bad = open_dataset(four_shards, "train"), []
    for i in range(40):
        try:
            assert source[i]["name"] == f"{i}"
        except UserError as error:
            assert files[damaged].name in str(error) and f"split='{without}'" in str(error)
            bad.append(i)
    assert bad and set(bad) <= set(range(10 * damaged, 10 * damaged + 10))
    rest = open_dataset(four_shards, without)
    assert [rest[i]["name"] for i in range(len(rest))] == [f"{i}" for i in range(40) if i // 10 != damaged]


def test_parts_of_splits(four_shards):
    parts = open_dataset(four_shards, "train[5:8]+train[35:]")
    assert [parts[i]["name"] for i in range(len(parts))] == ["5", "6", "7", "35", "36", "37", "38", "39"]
    sorted(four_shards.glob("*array_record*"))[3].write_bytes(b"damaged")
    parts = open_dataset(four_shards, "train[5:8]+train[35:]")
    with pytest.raises(UserError, match=r"00003\S*: .*split='train\[:30\]'"):
        parts[3]
    assert parts[2]["name"] == "7"
    with pytest.raises(UserError, match=r"'train\[99%:\]' contains no records \('train' has 40\)"):
        open_dataset(four_shards, "train[99%:]")
    with pytest.raises(UserError, match=r"no such part of a split: 'train\[a:\]'"):
        open_dataset(four_shards, "train[a:]")
    with pytest.raises(UserError, match=r"no split 'train\[:5\]\+test"):
        open_dataset(four_shards, "train[:5]+test[:5]")


def test_all_missing_shards_are_named_at_once(four_shards):
    """PKU-YuanGroup/ImgEdit#3: parts of a data set that are not there show before training, not during it."""
    files = sorted(four_shards.glob("*array_record*"))
    for i in (0, 2):
        files[i].unlink()
    with pytest.raises(UserError, match=rf"2 of 4 shards are missing, {files[0].name}, {files[2].name}") as error:
        open_dataset(four_shards, "train")
    assert "split='train[10:20]+train[30:]'" in str(error.value)
    with pytest.raises(UserError, match="1 of 1 shards is missing"):
        open_dataset(four_shards, "train[:5]")


def test_a_corpus_that_another_process_is_drawing_is_not_drawn_twice(tmp_path):
    with one_writer(tmp_path / "corpus", beside=True), pytest.raises(InUseError):
        build_corpus(tmp_path / "corpus", seed=0, sizes={"train": 2}, progress=False)
    build_corpus(tmp_path / "corpus", seed=0, sizes={"train": 2}, progress=False)
    with one_writer(tmp_path / "corpus", beside=True):
        build_corpus(tmp_path / "corpus", seed=0, sizes={"train": 2}, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
