"""Virtual environments for tests of packages that do not fit into the environment of the tests.

    python = environment("trl-oldest", ["torch==2.13.0", "trl==1.0.0"])
    run_in(python, "tests/interop/pytorch/neighbors.py", folder)

An environment is made once, in build/environments/, and found there by its name and requirements. Making one takes
minutes and needs a package registry, so these tests are marked `large`.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest

_FOLDER = pathlib.Path(__file__).parents[3] / "build" / "environments"
# What pip prints if it reaches no registry, in contrast to requirements that do not fit.
_NO_REGISTRY = (
    "NewConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ProxyError",
    "SSLError",
    "Temporary failure in name resolution",
    "Network is unreachable",
)


def environment(name: str, requirements: Sequence[str]) -> pathlib.Path:
    """Returns the Python of an environment with these requirements; skips the test if no registry can be reached."""
    digest = hashlib.sha256("\n".join([sys.version, *requirements]).encode()).hexdigest()[:8]
    folder = _FOLDER / f"{name}-{digest}"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if stamp.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)  # An installation that was interrupted.
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    result = subprocess.run(command, capture_output=True, text=True)
    if any(sign in result.stderr for sign in _NO_REGISTRY):
        pytest.skip(f"environment {name}: pip reaches no package registry: {result.stderr.strip()[-300:]}")
    assert result.returncode == 0, result.stderr
    # The log of a run says what was tested.
    stamp.write_text(subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True).stdout)
    return python


def run_in(python: pathlib.Path, *command: object, **variables: str) -> str:
    """Runs a script in an environment, without a network; returns what it prints, and fails the test if it fails."""
    # Without PYTHONPATH, the environment does not see the packages of the tests.
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [python, *map(str, command)], capture_output=True, text=True, env={**kept, **quiet, **variables}
    )
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
    return result.stdout
