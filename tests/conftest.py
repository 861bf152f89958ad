"""Settings of all tests: they run on the CPU, as eight simulated devices, so that meshes have several devices."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: LLVM's optimizations take three times as long as they save here.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

# Number of XLA's threads, by default the number of cores. A device that waits for the others in a collective blocks a
# thread, and may wait in several collectives at once. Eight devices on few threads would wait for each other forever.
os.environ["NPROC"] = "64"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache():
    """Stores compiled programs for the session, so that tests that need the same program compile it once."""
    with tempfile.TemporaryDirectory(prefix="jax_cache_") as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        yield
        jax.config.update("jax_compilation_cache_dir", None)


_LONG = ("training", "parallel", "tools", "backbones", "interop")


def pytest_collection_modifyitems(items):
    """Runs folders with long tests first, so that short ones are left to balance the workers at the end."""
    items.sort(key=lambda item: not any(f"tests/{folder}/" in item.nodeid for folder in _LONG))
