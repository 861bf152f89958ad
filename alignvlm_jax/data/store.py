r"""Reads and writes records as TFDS data sets in ArrayRecord files, without TensorFlow.

A data set is a folder with named splits of dict records. This module does not interpret the records: the features state
the type of each field, and reading follows them.

    open_dataset("data/synthetic", "train")[0]
    -> {"image": b"\x89PNG...", "id": "...", "questions": ["What is the total?", ...], ...}

A text is returned as `str`, a sequence of texts as a list, and an image as the encoded bytes that were stored
(`examples.py` decodes images, which is most of the work). A source has a length and random access, and can be pickled.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import posixpath
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from etils import epath

from alignvlm_jax.data import shard_names
from alignvlm_jax.data.nearby import describe_no_dataset
from alignvlm_jax.data.open_files import ArrayRecordFiles
from alignvlm_jax.errors import TemporaryError, UserError
from alignvlm_jax.locations import is_local, open_location

_VERSION = "1.0.0"
_RECORDS_PER_SHARD = 20_000
# Words of ArrayRecord's client for a file that is out of reach, not damaged.
_NOT_READ = re.compile(r"Permanent error|Retry policy exhausted|with a last message")
_RECORDS_PER_WRITE = 512  # the writer updates its metadata after every write, so records are written in chunks


class _ShardPart(NamedTuple):
    """Some records of one file. The complete file has the records `first` to `after` - 1 of the split's `total`."""

    file: str
    num_records: int
    split: str
    first: int
    after: int
    total: int


class RecordSource:
    """Random access to the records of one split of a data set, or of parts of splits ("train[:90%]").

    Attributes:
      folder: folder of the data set.
      identity: hash that differs between data sets, and between selections of their records.
    """

    def __init__(
        self, source: Any, features: tfds.features.FeaturesDict, shards: Sequence[_ShardPart], folder: str = ""
    ):
        self._source, self._shard_parts, self.folder = source, tuple(shards), folder
        self._texts = tuple(key for key, feature in features.items() if isinstance(feature, tfds.features.Text))
        self._text_sequences = tuple(
            key
            for key, feature in features.items()
            if isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.Text)
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # A `for` loop over a source ends with an IndexError. The file would raise what damage raises.
        if not 0 <= index < len(self):
            raise IndexError(f"record {index}: expected 0 to {len(self) - 1}")
        try:
            record = self._source[index]
        except (RuntimeError, ValueError, OSError) as error:  # array_record detects damage by checksums
            shard = self._shard_of(index)
            # ArrayRecord has tried again for 15 minutes before it raises this, except for a lost permission.
            if not is_local(shard.file) and _NOT_READ.search(str(error)) and not re.search(r'"code": ?404', str(error)):
                raise TemporaryError(
                    f"{shard.file}: the bucket cannot be read now ({error}). Run the same command again later"
                ) from error
            raise UserError(
                f"{shard.file}: a record cannot be read, it may be damaged ({error}). Restore the file from a copy"
                + _without([shard])
            ) from error
        for key in self._texts:
            record[key] = record[key].decode()
        for key in self._text_sequences:
            record[key] = [text.decode() for text in record[key]]
        return record

    @functools.cached_property
    def identity(self) -> str:
        """Hash of the data set's metadata, which state the size of every shard, and of the selected records."""
        parts = [(posixpath.basename(shard.file), shard.first, shard.num_records) for shard in self._shard_parts]
        info = (epath.Path(self.folder) / "dataset_info.json").read_bytes()
        return hashlib.sha256(info + repr(parts).encode()).hexdigest()

    def _shard_of(self, index: int) -> _ShardPart:
        """Returns the file that holds a record."""
        # The parts are in the order of the records.
        for shard in self._shard_parts:
            if index < shard.num_records:
                break
            index -= shard.num_records
        return shard


def open_dataset(folder: str | Path, split: str) -> RecordSource:
    """Opens a split of a data set, or parts of splits in the notation of TFDS: "train[:1000]+train[2000:]".

    Raises:
      UserError: if the folder is not a data set, it has no such split, or a shard of the split is missing.
    """
    folder = os.fspath(open_location(folder))
    if folder.startswith("s3://"):
        raise UserError(
            f"{folder}: data sets are read from a disk or gs://. Mount the bucket with Mountpoint for Amazon S3: "
            f"mount-s3 {folder.split('/')[2]} /mnt/data"
        )
    builder = _open_builder(folder)
    splits = builder.info.splits
    # Check the names separately, for a message that lists the existing splits.
    if any(part.partition("[")[0].strip() not in splits for part in split.split("+")):
        raise UserError(f"no split {split!r} in {folder}: it has {', '.join(sorted(splits))}")
    features = builder.info.features
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    decoders = {key: tfds.decode.SkipDecoding() for key in images}
    try:
        if not splits[split].num_examples:
            names = sorted({part.partition("[")[0].strip() for part in split.split("+")})
            sizes = " and ".join(f"{name!r} has {splits[name].num_examples}" for name in names)
            raise UserError(f"{folder}: {split!r} contains no records ({sizes}). Choose a larger part")
        source, shards = builder.as_data_source(split, decoders=decoders), tuple(_shard_parts(splits, split))
        # TFDS would keep the files of all shards open.
        source.data_source = ArrayRecordFiles(splits[split].file_instructions)
    except ValueError as error:
        raise UserError(f"{folder}: no such part of a split: {split!r} ({error})") from error
    _check_complete(folder, shards)
    return RecordSource(source, features, shards, folder)


def _check_complete(folder: str, shards: Sequence[_ShardPart]) -> None:
    """Raises a `UserError` if a file of the selected records is missing; otherwise it would show during training."""
    present = {path.name for path in epath.Path(folder).iterdir()}
    absent = [shard for shard in shards if posixpath.basename(shard.file) not in present]
    if not absent:
        return
    missing = shard_names.describe_missing([shard.file for shard in absent], len(shards))
    raise UserError(f"{folder}: {missing}. Restore the files from a copy{_without(absent)}")


def _without(shards: Sequence[_ShardPart]) -> str:
    """Returns the end of a message: the split without the records of these files, if any records remain."""
    parts = []
    for name in dict.fromkeys(shard.split for shard in shards):
        first, total = 0, next(shard.total for shard in shards if shard.split == name)
        for start, stop in sorted((shard.first, shard.after) for shard in shards if shard.split == name):
            if start > first:
                parts.append(f"{name}[{first or ''}:{start}]")
            first = max(first, stop)
        if first < total:
            parts.append(f"{name}[{first}:]")
    return f", or omit it: split={'+'.join(parts)!r} in the mixture of the stage" if parts else ""


def is_occupied(folder: str | Path) -> bool:
    """Returns whether the path is a file or a folder with contents, which writing a data set would replace."""
    folder = Path(folder)
    return folder.is_file() or folder.is_dir() and any(folder.iterdir())


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """Returns the metadata that `write_dataset` stored with a data set."""
    return dict(_open_builder(folder).info.metadata or {})


def write_dataset(
    folder: str | Path,
    features: Mapping[str, tfds.features.FeatureConnector],
    splits: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    name: str = "documents",
    description: str = "",
    metadata: Mapping[str, Any] | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Writes records, split by split and in the given order; images are encoded bytes in an `io.BytesIO`.

    The folder appears only when it is complete. An interrupted run leaves at most `FOLDER.partial`, which the next run
    removes.

    Args:
      folder: folder of the data set.
      features: features of a record.
      splits: records of each split.
      name: name of the data set.
      description: description of the data set.
      metadata: metadata of the data set, as JSON values.
      check: called before the folder gets its name. It raises an error to prevent that.

    Raises:
      UserError: if the folder is not empty, or a split is called "all".
    """
    folder = Path(folder)
    if is_occupied(folder):
        raise UserError(f"{folder} exists already: remove it or choose another folder")
    if "all" in splits:
        raise UserError("'all' cannot be the name of a split: in TFDS it means all splits together")
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
        # Splits are written one after the other, so only one chunk of records is in memory.
        writer.initialize_splits(list(splits))
        for split, records in splits.items():
            for chunk in _chunks(records):
                writer.add_examples({split: chunk})
            writer.close_splits([split])
        check()


def _shard_parts(splits: tfds.core.splits.SplitDict, split: str) -> Iterator[_ShardPart]:
    """Yields the files that hold the records of a split, or of parts of splits, in the order of the records."""
    # Location of each file's records: split, first record, the one after the last, and number of records in the split.
    locations = {}
    for name, info in splits.items():
        ends = list(itertools.accumulate(info.shard_lengths))
        for file, length, end in zip(info.filepaths, info.shard_lengths, ends, strict=True):
            locations[str(file)] = name, end - length, end, ends[-1]
    for instruction in splits[split].file_instructions:
        yield _ShardPart(str(instruction.filename), instruction.take, *locations[str(instruction.filename)])


def _open_builder(folder: str | Path) -> tfds.core.DatasetBuilder:
    """Opens a data set; raises a `UserError` if the folder is not one."""
    if not (epath.Path(folder) / "dataset_info.json").is_file():
        raise UserError(describe_no_dataset(folder))
    return tfds.builder_from_directory(str(folder))


def _chunks(records: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Yields the records in lists of `_RECORDS_PER_WRITE`."""
    records = iter(records)
    while chunk := list(itertools.islice(records, _RECORDS_PER_WRITE)):
        yield chunk


@contextlib.contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to write to, which gets its final name only if no error occurs."""
    partial = folder.with_name(folder.name + ".partial")
    # Remove what a killed run left.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
