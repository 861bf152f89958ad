"""Writes a step to S3 through a local disk, because Orbax writes to disks and to GCS only.

Orbax writes the step to a folder on the disk. Every process then uploads the files that it wrote, several at a time,
and deletes them. The disk must hold one checkpoint. The digests that make a step count are written after all uploads.

The folder is in the folder for temporary files, or in the one that `ALIGNVLM_STAGING` names. With several processes it
must be on a disk that all of them share.
"""

import concurrent.futures
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import jax

from alignvlm_jax.checkpoints.step_files import writer_of
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import as_path
from alignvlm_jax.storage.clients import file_system
from alignvlm_jax.storage.errors import translated_errors

STAGING_VARIABLE = "ALIGNVLM_STAGING"
_THREADS = 8
_ONE_PART = 2**30  # a file of this size or less is one part, whose ETag is its MD5


def is_staged(step: Path) -> bool:
    """Returns whether a step is written through a local disk."""
    return str(step).startswith("s3://")


def staging_root() -> Path:
    """Returns the folder on a disk that steps are staged in.

    Raises:
      UserError: if there are several processes, and no folder that they share is named.
    """
    folder = os.environ.get(STAGING_VARIABLE)
    if not folder and jax.process_count() > 1:
        raise UserError(
            f"checkpoints on s3:// are staged on a disk that all processes share: set {STAGING_VARIABLE} to a folder "
            "there, or keep the run in a bucket on gs:// or on that disk"
        )
    return as_path(folder or tempfile.gettempdir())


def staging_folder(step: Path) -> Path:
    """Returns the folder on a disk that a step is staged in. A run that was killed finds what it left there."""
    run = hashlib.sha256(str(step.parent).encode()).hexdigest()[:16]
    return staging_root().absolute() / f"alignvlm-staging-{run}" / step.name


def clear(step: Path) -> None:
    """Deletes everything that this run has staged."""
    shutil.rmtree(staging_folder(step).parent, ignore_errors=True)


def upload(step: Path) -> None:
    """Uploads the files of a staged step that this process wrote, and deletes them.

    Raises:
      TemporaryError, UserError: if the bucket cannot be written.
    """
    folder, store = staging_folder(step), file_system(step)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    def send(name: str) -> None:
        # Each upload ends with a checksum of its content, which S3 compares.
        store.put_file(str(folder / name), f"{step}/{name}", chunksize=_ONE_PART)
        (folder / name).unlink()

    with translated_errors(str(step)), concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(send, [name for name in names if writer_of(name) == jax.process_index()]))
    if jax.process_count() == 1:
        clear(step)
