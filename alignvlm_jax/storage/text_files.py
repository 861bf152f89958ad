"""Text files that a run replaces or extends, on a disk or in a bucket."""

from pathlib import Path

from alignvlm_jax.locations import is_bucket
from alignvlm_jax.storage.errors import translated_errors


def replace_text(path: Path, text: str) -> None:
    """Writes a file, which replaces an existing one only when it is complete.

    Raises:
      OSError: if the disk cannot be written.
      TemporaryError, UserError: if the bucket cannot be written.
    """
    if is_bucket(path):
        with translated_errors(str(path)):
            path.write_text(text, encoding="utf-8")
        return
    # Write under another name and rename, so that a kill cannot leave half a file.
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def append_text(path: Path, text: str) -> None:
    """Adds text to the end of a file that only this process writes. In a bucket, the object is written again.

    Raises:
      OSError: if the disk cannot be written.
      TemporaryError, UserError: if the bucket cannot be written.
    """
    if not is_bucket(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
        return
    replace_text(path, read_text_if_exists(path) + text)


def read_text_if_exists(path: Path) -> str:
    """Returns the text of a file, or "" if there is none.

    Raises:
      OSError: if the disk cannot be read.
      TemporaryError, UserError: if the bucket cannot be read.
    """
    try:
        with translated_errors(str(path)):
            return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
