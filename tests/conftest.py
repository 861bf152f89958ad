"""Runs every test on the CPU with eight simulated devices, so that meshes are real; offers buckets on loopback."""

import contextlib
import gc
import itertools
import os
import tempfile
from importlib.metadata import version

from packaging.version import Version

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        # Tests compile much and compute little: LLVM's optimizations take three times the time that they save here.
        "--xla_backend_optimization_level=0",
        # The emitters for fusions take almost half of the compile time. jaxlib 0.11 has removed the older path.
        "--xla_cpu_use_fusion_emitters=false" if Version(version("jaxlib")) < Version("0.11") else "",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

# Number of XLA's threads, by default the number of cores. A device that waits for others in a collective blocks a
# thread, and may wait in several collectives at once: with few threads, eight devices would wait forever.
os.environ["NPROC"] = "64"

# A mistyped folder may look like a name on the Hugging Face Hub. Tests of downloads have a Hub on loopback.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

from tests import emulators, fault_proxy, hub_server

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache():
    """Shares compiled programs between the tests of a worker, and with the processes that they start."""
    with tempfile.TemporaryDirectory(prefix="jax_cache_") as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        yield
        jax.config.update("jax_compilation_cache_dir", None)


_NUMBERS = itertools.count(1)


@pytest.fixture(scope="session")
def gcs_server():
    """URL of a server that speaks Google Cloud Storage's protocol. It starts with the first test that uses it."""
    with emulators.gcs_server() as url:
        yield url


@pytest.fixture(scope="session")
def s3_server():
    """URL of a server that speaks S3's protocol."""
    with emulators.s3_server() as url:
        yield url


@pytest.fixture
def gcs_bucket(gcs_server, monkeypatch):
    """URL of an empty bucket, gs://NAME, which every client finds, also in processes that the test starts."""
    with _clients(monkeypatch, emulators.gcs_environment(gcs_server)):
        yield emulators.make_gcs_bucket(gcs_server, _new_name())


@pytest.fixture
def s3_bucket(s3_server, monkeypatch):
    """URL of an empty bucket, s3://NAME."""
    with _clients(monkeypatch, emulators.s3_environment(s3_server)):
        yield emulators.make_s3_bucket(s3_server, _new_name())


@pytest.fixture
def gcs_proxy(gcs_server, monkeypatch):
    """`fault_proxy.Proxy` before the store. Its `bucket` is the URL of an empty bucket, reached through the proxy."""
    with fault_proxy.proxy(gcs_server) as proxy, _clients(monkeypatch, emulators.gcs_environment(proxy.url)):
        proxy.bucket = emulators.make_gcs_bucket(gcs_server, _new_name())
        yield proxy


@pytest.fixture
def s3_proxy(s3_server, monkeypatch):
    """The same before S3's store."""
    with fault_proxy.proxy(s3_server) as proxy, _clients(monkeypatch, emulators.s3_environment(proxy.url)):
        proxy.bucket = emulators.make_s3_bucket(s3_server, _new_name())
        yield proxy


def _new_name():
    return f"bucket-{next(_NUMBERS)}"


@contextlib.contextmanager
def _clients(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    emulators.forget_clients()
    yield
    emulators.forget_clients()


@pytest.fixture(scope="session")
def hub_process():
    """A Hugging Face Hub on loopback, which starts with the first test that uses it."""
    server = hub_server.HubServer()
    yield server
    server.close()


@pytest.fixture
def hub(hub_process, tmp_path, monkeypatch):
    """The Hub without repositories, and an empty cache; nobody is logged in."""
    hub_process.clear()
    hub_server.use(hub_process, tmp_path, monkeypatch)
    yield hub_process
    hub_server.forget()


def pytest_collection_finish():
    """Collects garbage less often: a search through all objects of JAX's caches and of the imports takes 0.4 s."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 100)


_LONG = ("training", "parallel", "tools", "pretraining", "interop")


def pytest_collection_modifyitems(items):
    """Runs folders with long tests first, so that short ones are left to balance the workers at the end."""
    items.sort(key=lambda item: not any(f"tests/{folder}/" in item.nodeid for folder in _LONG))
