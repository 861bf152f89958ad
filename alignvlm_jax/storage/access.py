"""Checks that a bucket can be used, before any long work."""

import time
import uuid
from collections.abc import Callable

from alignvlm_jax.errors import TemporaryError, UserError
from alignvlm_jax.locations import open_location
from alignvlm_jax.storage.errors import mark_as_used, translated_errors

_ATTEMPTS = 4
_WAIT_SECONDS = 2.0  # doubles


def check_writable(location: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Checks that objects can be written, listed and deleted in the folder of a location. Leaves nothing behind.

    A missing permission is tried again for some seconds, because those of a new machine take a while to arrive.

    Raises:
      UserError: if the bucket does not exist, or does not permit it.
      TemporaryError: if the bucket cannot be reached now.
    """
    probe = open_location(location) / f".alignvlm-probe-{uuid.uuid4().hex}"
    for attempt in range(_ATTEMPTS):
        try:
            with translated_errors(location):
                probe.write_bytes(b"")
                list(probe.parent.iterdir())
                probe.unlink()
            return mark_as_used(location)
        except FileNotFoundError as error:
            bucket = "/".join(location.split("/")[:3])
            raise UserError(f"{location}: there is no bucket {bucket}, or this account may not see it") from error
        except TemporaryError:
            raise
        except UserError:
            if attempt == _ATTEMPTS - 1:
                raise
            sleep(_WAIT_SECONDS * 2**attempt)
