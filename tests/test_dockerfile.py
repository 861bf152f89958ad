"""The container image. test_package.py builds the wheel from the files that the image copies."""

import fnmatch
import pathlib
import subprocess
import sys

from tests.built_package import ROOT, copied_to_image

LINES = (ROOT / "Dockerfile").read_text().splitlines()


def test_hadolint_finds_nothing():
    hadolint = pathlib.Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_has_all_files_and_an_extra_for_each_accelerator():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = set(copied_to_image())
    assert ignored[0] == "*" and copied == kept and all((ROOT / name).exists() for name in copied)
    assert not any(fnmatch.fnmatch(name, line) for name in copied for line in ignored[1:] if not line.startswith("!"))
    setup = (ROOT / "setup.py").read_text()
    assert all(f'"{extra}": ' in setup for extra in ("cpu", "cuda", "cuda13", "tpu", "gcs"))
    assert "ARG EXTRA=cpu" in LINES
    assert "FROM python:3.11-slim" in LINES and 'python_requires=">=3.11"' in setup
