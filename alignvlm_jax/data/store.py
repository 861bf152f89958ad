"""Records on disk: TFDS data sets in ArrayRecord files, written and read without TensorFlow.

A data set is a folder with named splits of dict records. Nothing here knows what the records are about: the features
say what each field is, and reading goes by them.

    open_dataset("data/synthetic", "train")[0]
    -> {"image": b"\\x89PNG...", "id": "...", "questions": ["What is the total?", ...], ...}

Text comes back as `str`, a sequence of texts as a list, an image as the encoded bytes it was stored as (decoding is the
pipeline's work, and most of its cost). A source has a length and random access: `grain.MapDataset.source(source)`.
"""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from alignvlm_jax.errors import UserError

_VERSION = "1.0.0"
_RECORDS_PER_SHARD = 20_000
_RECORDS_AT_A_TIME = 512  # the writer brings its metadata up to date after each lot


class RecordSource:
    """One split of a data set, random access, ready for grain."""

    def __init__(self, source: Any, features: tfds.features.FeaturesDict):
        self._source = source
        self._texts = tuple(key for key, feature in features.items() if isinstance(feature, tfds.features.Text))
        self._text_sequences = tuple(
            key
            for key, feature in features.items()
            if isinstance(feature, tfds.features.Sequence) and isinstance(feature.feature, tfds.features.Text)
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._source[index]
        for key in self._texts:
            record[key] = record[key].decode()
        for key in self._text_sequences:
            record[key] = [text.decode() for text in record[key]]
        return record


def open_dataset(folder: str | Path, split: str) -> RecordSource:
    """A split of the data set in this folder."""
    builder = _open_builder(folder)
    if split not in builder.info.splits:
        raise UserError(f"no split {split!r} in {folder}: it has {', '.join(sorted(builder.info.splits))}")
    features = builder.info.features
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    decoders = {key: tfds.decode.SkipDecoding() for key in images}
    return RecordSource(builder.as_data_source(split, decoders=decoders), features)


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
    with _appearing_whole(folder) as partial:
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


def _open_builder(folder: str | Path) -> tfds.core.DatasetBuilder:
    if not (epath.Path(folder) / "dataset_info.json").is_file():
        raise UserError(f"{folder} is not a data set: it holds no dataset_info.json")
    return tfds.builder_from_directory(str(folder))


def _lots(records: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    records = iter(records)
    while lot := list(islice(records, _RECORDS_AT_A_TIME)):
        yield lot


@contextlib.contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """A folder to write to that takes its name only if all went well."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
