"""Translates the errors of the libraries that reach buckets into errors of this package.

gcsfs, google-cloud-storage, s3fs, botocore and TensorStore each have exceptions of their own. All of them have retried
a request that may succeed later before they raise one.

    429, 408, 416, 5xx, no connection, a timeout         TemporaryError: exit code 75, so that a launcher tries again
    403 because of a rate limit                          TemporaryError
    403, 401 in a bucket that this process has used      TemporaryError: an expired token, a change of permissions
    403, 401 otherwise; no credentials; no such bucket   UserError: exit code 2

An object that does not exist is a FileNotFoundError in all libraries but TensorStore, and is left to the caller.
"""

import contextlib
import re
import traceback
import urllib.parse
from collections.abc import Iterator

from alignvlm_jax.errors import TemporaryError, UserError

_STATUS = re.compile(
    r"(?:HTTP (?:response )?(?:status )?code:? ?|HTTP/\S+ |[Ee]rror code: |status: |http_response_code=')(\d{3})\b"
)
_RATE_LIMITS = re.compile(r"rate ?limit|quota|slow ?down|too many requests|reduce your request rate|throttl", re.I)
# Words of TensorStore's messages for errors without an HTTP status. The last two: an object that was just written is
# shorter than it should be.
_TEMPORARY = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|OUT_OF_RANGE|DATA_LOSS)\b|timed out|"
    r"[Cc]ould ?n[o']t connect"
)
_NETWORK_MODULES = ("aiohttp", "requests", "urllib3", "botocore.exceptions", "aiobotocore")
_LIBRARIES = (*_NETWORK_MODULES, "gcsfs", "s3fs", "botocore", "google.api_core", "google.auth", "google.cloud")
_TEMPORARY_STATUS = {408, 416, 429, *range(500, 600)}
_GRANT = "grant this account the right to list, read, write and delete objects there"
_used_buckets: set[str] = set()


def mark_as_used(location: str) -> None:
    """Records that this process has read and written a bucket, so that a later 403 is an error that passes."""
    _used_buckets.add(_bucket(location))


@contextlib.contextmanager
def translated_errors(location: str) -> Iterator[None]:
    """Raises errors of the libraries in the `with` block as errors of this package. Others pass unchanged.

    Raises:
      TemporaryError: if the same request may succeed later.
      UserError: if a person must fix the cause.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if translated := translate(error, location):
            raise translated from error
        raise


def translate(error: BaseException, location: str = "") -> UserError | None:
    """Returns the error of this package for an error of the libraries, or None if it comes from somewhere else.

    Args:
      error: the exception.
      location: the bucket that was used. Without it, only errors that are certainly those of a bucket are translated.
    """
    if isinstance(error, UserError):
        return error
    if not location and not _is_of_a_bucket(error):
        return None
    status, text = _status(error), _text(error)
    where = f"{location}: " if location else ""
    if status in (401, 403):
        if _RATE_LIMITS.search(text) or (_bucket(location) or _named_bucket(error)) in _used_buckets:
            return TemporaryError(
                f"{where}the bucket refuses access for now ({text}). Run the same command again later; if that does "
                f"not help, {_GRANT}"
            )
        return UserError(f"{where}no permission ({text}). {_GRANT.capitalize()}")
    if status in _TEMPORARY_STATUS or (status is None and _is_temporary(error, text)):
        return TemporaryError(f"{where}the bucket cannot be reached now ({text}). Run the same command again later")
    if _has_no_credentials(error):
        return UserError(
            f"{where}no credentials: run `gcloud auth application-default login` for gs://, `aws configure` for s3://, "
            "or give the machine a service account"
        )
    if status is not None and isinstance(error, Exception):
        return UserError(f"{where}the bucket refuses the request: {text}")
    return None


def _is_of_a_bucket(error: BaseException) -> bool:
    """Returns whether a library that reaches buckets raised an error, as its traceback or its message tells."""
    frames = (frame for link in _chain(error) for frame, _ in traceback.walk_tb(link.__traceback__))
    names = {frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames}
    is_from_google = any(_is_from(link, ("google.api_core", "google.cloud.storage")) for link in _chain(error))
    return is_from_google or bool(names & {"gcsfs", "s3fs"}) or re.search(r"\b(gs|s3)://", str(error)) is not None


def _named_bucket(error: BaseException) -> str:
    """Returns the bucket that an error's message names, or "" if it names none."""
    # gcsfs: "Forbidden: b/BUCKET/o/OBJECT".
    match = re.search(r"(?:\b(?:gs|s3)://|: b/)([^/\s]+)", str(error))
    return match[1] if match else ""


def _bucket(location: str) -> str:
    return urllib.parse.urlsplit(str(location)).netloc


def _status(error: BaseException) -> int | None:
    """Returns the HTTP status of an error of the libraries, or None if it has none."""
    for link in _chain(error):
        if not _is_from(link, _LIBRARIES) and not isinstance(link, (OSError, ValueError)):
            continue
        # A response of `requests` is false if its status is an error.
        if (response := getattr(link, "response", None)) is not None:
            metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
            status = metadata.get("HTTPStatusCode") or getattr(response, "status_code", None)
        else:
            status = getattr(link, "code", None) or getattr(link, "status", None)
        if isinstance(status, str) and status.isdigit():
            status = int(status)
        if isinstance(status, int) and 400 <= status < 600:
            return int(status)
        if isinstance(link, OSError) and str(link).startswith("Forbidden: "):  # gcsfs
            return 403
        if match := _STATUS.search(str(link)):  # TensorStore
            return int(match[1])
    return None


def _is_temporary(error: BaseException, text: str) -> bool:
    if _has_no_credentials(error):
        return False
    return any(
        _is_from(link, _NETWORK_MODULES) or isinstance(link, (TimeoutError, ConnectionError)) for link in _chain(error)
    ) or (isinstance(error, (ValueError, OSError)) and _TEMPORARY.search(text) is not None)


def _has_no_credentials(error: BaseException) -> bool:
    names = {type(link).__name__ for link in _chain(error)}
    return bool(names & {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound"})


def _is_from(error: BaseException, modules: tuple[str, ...]) -> bool:
    return any(f"{type(error).__module__}.".startswith(f"{module}.") for module in modules)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and its causes."""
    link: BaseException | None = error
    for _ in range(10):
        if link is None:
            return
        yield link
        link = link.__cause__


def _text(error: BaseException) -> str:
    """Returns the first line of an error's message, or its name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Forbidden: ") and len(lines) > 1:
        return lines[1]
    return lines[0][:300] if lines else type(error).__name__
