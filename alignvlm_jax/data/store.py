"""Records on disk: TFDS data sets in ArrayRecord files, written and read without TensorFlow.

A data set is a folder with named splits of dict records. Nothing here knows what the records are about: the features
say what each field is, and reading goes by them.

    open_dataset("data/synthetic", "train")[0]
    -> {"image": b"\\x89PNG...", "id": "...", "questions": ["What is the total?", ...], ...}

Text comes back as `str`, a sequence of texts as a list, an image as the encoded bytes it was stored as (decoding is the
work of `examples.py`, and most of its cost). A source has a length and random access, and can be pickled.
"""

import contextlib
import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from etils import epath

from alignvlm_jax.errors import UserError

_VERSION = "1.0.0"
_RECORDS_PER_SHARD = 20_000
_RECORDS_AT_A_TIME = 512  # the writer brings its metadata up to date after each lot


class _ShardPart(NamedTuple):
    """`take` records of one file, all of whose records are number `first` to `after` - 1 of the `total` of a split."""

    file: str
    take: int
    split: str
    first: int
    after: int
    total: int


class RecordSource:
    """One split of a data set, or parts of one ("train[:90%]"), random access."""

    def __init__(self, source: Any, features: tfds.features.FeaturesDict, shards: Sequence[_ShardPart]):
        self._source, self._shards = source, tuple(shards)
        self._texts = tuple(key for key, feature in features.items() if isinstance(feature, tfds.features.Text))
        self._text_sequences = tuple(
            key
            for key, feature in features.items()
            if isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.Text)
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self._source[index]
        except (RuntimeError, ValueError, OSError) as error:  # array_record finds damage by its checksums
            raise UserError(self._explain(index, error)) from error
        for key in self._texts:
            record[key] = record[key].decode()
        for key in self._text_sequences:
            record[key] = [text.decode() for text in record[key]]
        return record

    def _explain(self, index: int, error: Exception) -> str:
        """Which file it was, and how to go on without it."""
        for shard in self._shards:
            if index < shard.take:
                break
            index -= shard.take
        others = [f"{shard.split}[:{shard.first}]"] * (shard.first > 0)
        others += [f"{shard.split}[{shard.after}:]"] * (shard.after < shard.total)
        without = f", or go on without it: split={'+'.join(others)!r} in the mixture of the stage" if others else ""
        return f"{shard.file}: a record cannot be read, is the file damaged? ({error}) Put it back from a copy{without}"


def open_dataset(folder: str | Path, split: str) -> RecordSource:
    """A split of the data set in this folder; parts of splits as TFDS names them: "train[:1000]+train[2000:]"."""
    builder = _open_builder(folder)
    splits = builder.info.splits
    if any(part.partition("[")[0].strip() not in splits for part in split.split("+")):
        raise UserError(f"no split {split!r} in {folder}: it has {', '.join(sorted(splits))}")
    features = builder.info.features
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    decoders = {key: tfds.decode.SkipDecoding() for key in images}
    try:
        source, shards = builder.as_data_source(split, decoders=decoders), _shards(splits, split)
    except ValueError as error:
        raise UserError(f"{folder}: no such part of a split: {split!r} ({error})") from error
    return RecordSource(source, features, shards)


def is_occupied(folder: str | Path) -> bool:
    """Whether something is there that a data set of this name would take the place of."""
    folder = Path(folder)
    return folder.is_file() or folder.is_dir() and any(folder.iterdir())


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """What `write_dataset` was told to remember of this data set."""
    return dict(_open_builder(folder).info.metadata or {})


def write_dataset(
    folder: str | Path,
    features: Mapping[str, tfds.features.FeatureConnector],
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    name: str = "documents",
    description: str = "",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write records, split by split and in the order given; images as encoded bytes in an `io.BytesIO`.

    The folder appears once everything is in it: an interrupted run leaves at most `FOLDER.partial`, which the next one
    clears away. A folder that holds something already is not touched.
    """
    folder = Path(folder)
    if is_occupied(folder):
        raise UserError(f"{folder} exists already: remove it or choose another folder")
    if "all" in splits:
        raise UserError("'all' cannot be the name of a split: TFDS means every split by it")
    with _atomic_folder(folder) as partial:
        info = tfds.core.DatasetInfo(
            builder=tfds.core.DatasetIdentity(
                name=name, version=tfds.core.Version(_VERSION), data_dir=str(partial), module_name=__name__
            ),
            description=description,
            features=tfds.features.FeaturesDict(dict(features)),
            metadata=tfds.core.MetadataDict(metadata or {}),
        )
        writer = tfds.core.SequentialWriter(info, _RECORDS_PER_SHARD, file_format="array_record")
        writer.initialize_splits(list(splits))
        for split, records in splits.items():
            for lot in _lots(records):
                writer.add_examples({split: lot})
            writer.close_splits([split])


def _shards(splits: tfds.core.splits.SplitDict, split: str) -> Iterator[_ShardPart]:
    """The files that the records of a split, or of its parts, are in, in their order."""
    places = {}
    for name, info in splits.items():
        ends = list(itertools.accumulate(info.shard_lengths))
        for file, length, end in zip(info.filepaths, info.shard_lengths, ends, strict=True):
            places[str(file)] = name, end - length, end, ends[-1]
    for instruction in splits[split].file_instructions:
        yield _ShardPart(str(instruction.filename), instruction.take, *places[str(instruction.filename)])


def _open_builder(folder: str | Path) -> tfds.core.DatasetBuilder:
    if not (epath.Path(folder) / "dataset_info.json").is_file():
        raise UserError(f"{folder} is not a data set: it holds no dataset_info.json")
    return tfds.builder_from_directory(str(folder))


def _lots(records: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    records = iter(records)
    while lot := list(itertools.islice(records, _RECORDS_AT_A_TIME)):
        yield lot


@contextlib.contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to that takes its name only if all went well."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
