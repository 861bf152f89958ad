"""Makes disks and folders that really fail.

Tests often run as root, which ignores permissions. So disks are mounted small or read-only, and folders made immutable.
"""

import contextlib
import pathlib
import subprocess

import pytest


def _run_or_skip(*command) -> None:
    try:
        subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{command[0]} is not possible here ({error})")


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, megabytes: int):
    """Mounts a file system of that size on `folder`; skips the test if mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    _run_or_skip("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def read_only(folder: pathlib.Path):
    """Makes the folder read-only; it must be a mounted file system, such as that of `small_disk`."""
    _run_or_skip("mount", "-o", "remount,ro", folder)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)


@contextlib.contextmanager
def immutable(folder: pathlib.Path):
    """Makes the folder immutable, also for root."""
    _run_or_skip("chattr", "+i", folder)
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(folder)], check=True)


def fill(disk: pathlib.Path) -> pathlib.Path:
    """Writes a file until the disk is full; returns its path."""
    path = disk / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return path
