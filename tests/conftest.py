"""Every test runs on the CPU, as eight simulated devices, so that meshes are real ones."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: LLVM's optimisations take three times what they save here.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

# XLA's threads; it looks here, and takes as many as there are cores otherwise. A device that waits for the others in a
# collective blocks one, and may wait in several at once: eight devices on few threads wait for each other for ever.
os.environ["NPROC"] = "64"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache():
    """Tests that compile the same program twice pay once."""
    with tempfile.TemporaryDirectory(prefix="jax_cache_") as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        yield
        jax.config.update("jax_compilation_cache_dir", None)


_LONG = ("training", "parallel", "tools", "backbones", "interop")


def pytest_collection_modifyitems(items):
    """Folders with long tests first: at the end there are short ones to share out between the workers."""
    items.sort(key=lambda item: not any(f"tests/{folder}/" in item.nodeid for folder in _LONG))
