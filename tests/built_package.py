"""Builds the sdist and the wheel as `make dist` does."""

import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def copied_to_image() -> list[str]:
    """Returns the files and folders of the clone that the Dockerfile copies."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    return [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]


def build_package(out: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Builds both from only the files that the container image has, and returns the sdist and the wheel."""
    with tempfile.TemporaryDirectory() as context:
        for name in copied_to_image():
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, f"{context}/{name}", ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, context)
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, context]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel
