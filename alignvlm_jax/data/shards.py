"""Data sets written shard by shard, by any number of processes.

A shard gets its final name when it is complete. `dataset_info.json`, which makes a folder of shards a data set, is
written last: until then no reader accepts the folder.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from alignvlm_jax.data.paths import atomic_file
from alignvlm_jax.errors import UserError

VERSION = "1.0.0"
INFO_FILE = "dataset_info.json"
_FILE_NAMES = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"


@dataclasses.dataclass(frozen=True)
class Shard:
    """Size of a shard: number of records and bytes."""

    records: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class ShardedDataset:
    """A data set of one split that is being written.

    Attributes:
      folder: folder of the data set.
      name: name of the data set.
      split: name of the split.
      features: fields of a record.
    """

    folder: epath.Path
    name: str
    split: str
    features: tfds.features.FeaturesDict

    def write_shard(self, index: int, records: Iterable[Mapping[str, Any]], scratch: epath.Path) -> Shard:
        """Writes a shard and returns its size.

        Args:
          index: number of the shard.
          records: the records of the shard.
          scratch: folder for the incomplete file, on the same disk.
        """
        serializer = tfds.core.example_serializer.ExampleSerializer(self.features.get_serialized_info())
        number, size, path = 0, 0, self.shard_path(index)
        with atomic_file(path, scratch) as partial, _array_record(partial, path) as writer:
            for record in records:
                example = serializer.get_tf_example(self.features.encode_example(record))
                # Without `deterministic`, the order of fields, and so the file, would differ between processes.
                encoded = example.SerializeToString(deterministic=True)
                writer.write(encoded)
                number, size = number + 1, size + len(encoded)
        return Shard(number, size)

    def shard_path(self, index: int) -> epath.Path:
        """Returns the path of a shard."""
        return epath.Path(self._template.sharded_filepath(shard_index=index, num_shards=None))

    def finish(
        self, shards: Sequence[Shard], scratch: epath.Path, *, description: str, metadata: Mapping[str, Any]
    ) -> None:
        """Writes the metadata that make the folder a data set of these shards."""
        info = tfds.core.DatasetInfo(
            builder=tfds.core.DatasetIdentity(
                name=self.name, version=tfds.core.Version(VERSION), data_dir=str(self.folder), module_name=__name__
            ),
            description=description,
            features=self.features,
            metadata=tfds.core.MetadataDict(metadata),
        )
        info.set_file_format("array_record")
        split = tfds.core.SplitInfo(
            name=self.split,
            shard_lengths=[shard.records for shard in shards],
            num_bytes=sum(shard.bytes for shard in shards),
            filename_template=self._template,
        )
        info.set_splits(tfds.core.splits.SplitDict([split]))
        with tempfile.TemporaryDirectory() as written:
            info.write_to_directory(written)
            # INFO_FILE comes last, because it marks the data set as complete.
            for file in sorted(os.listdir(written), key=lambda name: name == INFO_FILE):
                with atomic_file(self.folder / file, scratch) as partial:
                    shutil.copy(Path(written, file), partial)

    @property
    def _template(self) -> tfds.core.ShardedFileTemplate:
        """Names of the shard files."""
        return tfds.core.ShardedFileTemplate(
            dataset_name=self.name,
            data_dir=self.folder,
            split=self.split,
            filetype_suffix="array_record",
            template=_FILE_NAMES,
        )


@contextlib.contextmanager
def _array_record(partial: Path, path: epath.Path) -> Iterator[array_record_module.ArrayRecordWriter]:
    """Yields a writer. A disk error, which may show only on closing, becomes a `UserError` that names the file."""
    # One record per group, so that reading a record at random decompresses no others.
    writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")
    try:
        try:
            yield writer
        finally:
            writer.close()
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be written, the disk may be full ({error})") from error
