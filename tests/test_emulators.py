"""Every client that the package uses reads and writes the emulated object stores."""

import os
import subprocess
import sys
import time
import urllib.request

import pytest
import tensorstore
from array_record.python import array_record_module
from etils import epath


def test_the_clients_of_google_cloud_storage_reach_the_emulator(gcs_bucket):
    import fsspec
    from google.cloud import storage

    bucket = storage.Client().bucket(gcs_bucket.removeprefix("gs://"))
    store = tensorstore.KvStore.open(gcs_bucket + "/").result()

    (epath.Path(gcs_bucket) / "a" / "epath").write_bytes(b"1")
    fsspec.filesystem("gs").pipe(f"{gcs_bucket}/a/gcsfs", b"2")
    bucket.blob("a/google").upload_from_string(b"3")
    store["a/tensorstore"] = b"4"

    expected = {"epath": b"1", "gcsfs": b"2", "google": b"3", "tensorstore": b"4"}
    names = [f"a/{name}" for name in expected]
    assert {path.name: path.read_bytes() for path in (epath.Path(gcs_bucket) / "a").iterdir()} == expected
    files = fsspec.filesystem("gs")
    assert [files.cat(f"{gcs_bucket}/{name}") for name in names] == [*expected.values()]
    assert [bucket.blob(name).download_as_bytes() for name in names] == [*expected.values()]
    assert [store[name] for name in names] == [*expected.values()]


def test_array_records_are_read_from_the_emulator(gcs_bucket, tmp_path):
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "records"), "group_size:1")
    writer.write(b"one")
    writer.write(b"two")
    writer.close()
    (epath.Path(gcs_bucket) / "records").write_bytes((tmp_path / "records").read_bytes())
    reader = array_record_module.ArrayRecordReader(f"{gcs_bucket}/records")
    assert reader.ok() and reader.read([1, 0]) == [b"two", b"one"]


def test_an_upload_may_depend_on_the_generation_of_the_object(gcs_bucket):
    from google.api_core.exceptions import PreconditionFailed
    from google.cloud import storage

    blob = storage.Client().bucket(gcs_bucket.removeprefix("gs://")).blob("lease")
    blob.upload_from_string(b"first", if_generation_match=0)
    generation = blob.generation
    with pytest.raises(PreconditionFailed):
        blob.upload_from_string(b"second", if_generation_match=0)
    blob.upload_from_string(b"third", if_generation_match=generation)
    assert blob.download_as_bytes() == b"third"


def test_the_clients_of_s3_reach_the_emulator(s3_bucket):
    import s3fs

    (epath.Path(s3_bucket) / "a" / "epath").write_bytes(b"1")
    s3fs.S3FileSystem().pipe(f"{s3_bucket}/a/s3fs", b"2")
    store = tensorstore.KvStore.open(
        {
            "driver": "s3",
            "bucket": s3_bucket.removeprefix("s3://"),
            "endpoint": os.environ["AWS_ENDPOINT_URL"],
            "aws_region": "us-east-1",
        }
    ).result()
    store["a/tensorstore"] = b"3"
    assert {path.name: path.read_bytes() for path in (epath.Path(s3_bucket) / "a").iterdir()} == {
        "epath": b"1",
        "s3fs": b"2",
        "tensorstore": b"3",
    }
    assert store["a/s3fs"] == b"2"


PROGRAM = """
import time
from tests import emulators
with emulators.gcs_server() as url:
    print(url, flush=True)
    time.sleep(99)
"""


def test_the_server_ends_with_the_process_that_started_it():
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().strip()
        urllib.request.urlopen(f"{url}/storage/v1/b").close()
        process.kill()
    deadline = time.monotonic() + 60
    with pytest.raises(OSError):
        while time.monotonic() < deadline:
            urllib.request.urlopen(f"{url}/storage/v1/b").close()
