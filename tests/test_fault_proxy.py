"""The proxy forwards both protocols unchanged, and makes requests fail on demand."""

import pytest
from etils import epath

from tests import fault_proxy
from tests.fault_proxy import CUT, Fault


def test_requests_to_google_pass_unchanged_and_are_counted(gcs_proxy):
    import fsspec
    import tensorstore
    from google.cloud import storage

    folder = epath.Path(gcs_proxy.bucket) / "a b" / "c"
    (folder / "ä%2F").write_bytes(b"1234")
    assert (folder / "ä%2F").read_bytes() == b"1234" and [path.name for path in folder.iterdir()] == ["ä%2F"]
    assert gcs_proxy.requests["start"] == gcs_proxy.requests["upload"] == 1 == gcs_proxy.requests["read"]
    assert gcs_proxy.sent["upload"] == gcs_proxy.received["read"] == 4

    store = tensorstore.KvStore.open(gcs_proxy.bucket + "/").result()
    store["ts/x"] = b"56"
    blob = storage.Client().bucket(gcs_proxy.bucket.removeprefix("gs://")).blob("ts/y")
    blob.upload_from_string(b"789")
    assert store["ts/y"] == b"789" and blob.download_as_bytes(start=1, end=2) == b"89"
    assert store.list().result() == [b"a b/c/\xc3\xa4%2F", b"ts/x", b"ts/y"]
    fsspec.filesystem("gs").rm(f"{gcs_proxy.bucket}/ts", recursive=True)
    assert len(store.list().result()) == 1 and gcs_proxy.requests["delete"] >= 1
    assert not gcs_proxy.failed


def test_requests_to_s3_pass_unchanged(s3_proxy):
    folder = epath.Path(s3_proxy.bucket) / "a b" / "c"
    (folder / "ä+").write_bytes(b"1234")
    assert (folder / "ä+").read_bytes() == b"1234" and [path.name for path in folder.iterdir()] == ["ä+"]
    folder.rmtree()
    assert not folder.exists() and s3_proxy.requests["upload"] == 1 and s3_proxy.requests["delete"] >= 1


def test_kinds_and_names_of_requests():
    kinds = {
        ("POST", "/upload/storage/v1/b/b/o?uploadType=media&name=a%2Fb"): ("upload", "a/b"),
        ("POST", "/upload/storage/v1/b/b/o?uploadType=resumable&name=a"): ("start", "a"),
        ("PUT", "/upload/storage/v1/b/b/o?uploadType=resumable&name=a&upload_id=1"): ("upload", "a"),
        ("GET", "/storage/v1/b/b/o?prefix=a"): ("list", ""),
        ("GET", "/storage/v1/b/b/o/a%2Fb"): ("stat", "a/b"),
        ("GET", "/storage/v1/b/b/o/a%2Fb?alt=media"): ("read", "a/b"),
        ("GET", "/download/storage/v1/b/b/o/a?alt=media"): ("read", "a"),
        ("DELETE", "/storage/v1/b/b/o/a"): ("delete", "a"),
        ("POST", "/storage/v1/b/b/o/a/rewriteTo/b/b/o/c"): ("copy", "a"),
        ("GET", "/storage/v1/b/b"): ("other", ""),
        ("PUT", "/b/a/b"): ("upload", "a/b"),
        ("HEAD", "/b/a"): ("stat", "a"),
        ("GET", "/b?list-type=2&prefix=a"): ("list", ""),
        ("POST", "/b?delete"): ("delete", ""),
        ("POST", "/b/a?uploads"): ("start", "a"),
    }
    assert {key: fault_proxy.kind_and_name(*key) for key in kinds} == kinds
    body = b'--x\r\n\r\n{"name": "a/\\"b"}\r\n--x\r\n\r\n"name": "no"'
    assert fault_proxy.kind_and_name("POST", "/upload/storage/v1/b/b/o?uploadType=multipart", body) == (
        "upload",
        'a/"b',
    )


def test_faults_that_pass_are_retried_by_the_client(gcs_proxy):
    import tensorstore

    faults = {"a": Fault(status=503), "b": Fault(status=429), "c": CUT}
    gcs_proxy.fault = lambda request: faults.pop(request.name, None)
    store = tensorstore.KvStore.open(gcs_proxy.bucket + "/").result()
    for write in [store.write(name, name) for name in "abc"]:
        write.result()
    assert [store[name] for name in "abc"] == [b"a", b"b", b"c"]
    assert gcs_proxy.failed == {"upload": 3} and gcs_proxy.requests["upload"] == 6


def test_lost_permission_and_a_truncated_upload(gcs_proxy):
    import tensorstore

    store = tensorstore.KvStore.open(gcs_proxy.bucket + "/").result()
    gcs_proxy.fault = lambda request: fault_proxy.HALF if request.kind == "upload" else None
    store["x"] = b"1234"
    assert store["x"] == b"12"
    gcs_proxy.fault = fault_proxy.forbidden
    with pytest.raises(ValueError, match="403"):
        store["y"] = b"1"
