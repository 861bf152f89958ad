"""Runs every test on the CPU with eight simulated devices, so that meshes are real."""

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

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache():
    """Shares compiled programs between the tests of a worker, and with the processes that they start."""
    with tempfile.TemporaryDirectory(prefix="jax_cache_") as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        yield
        jax.config.update("jax_compilation_cache_dir", None)


_LONG = ("training", "parallel", "tools", "pretraining", "interop")


def pytest_collection_modifyitems(items):
    """Runs folders with long tests first, so that short ones are left to balance the workers at the end."""
    items.sort(key=lambda item: not any(f"tests/{folder}/" in item.nodeid for folder in _LONG))
