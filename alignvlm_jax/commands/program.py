"""Runs the body of a command-line program: errors become one line and an exit code.

Exit codes:

    0    success
    2    an error that the user can fix (one line on stderr)
    75   try again later, such as after a preemption
    130  interrupted
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable

from alignvlm_jax.commands.terminal import tolerant_output
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage.errors import translate

# Errors of the file system that a person must fix. The others, such as a server that does not answer, may pass.
_USER_ERRORS = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


def run_program(name: str, body: Callable[[], int | None], *, debug: bool = False) -> int:
    """Runs `body` and returns the exit code of the program.

    Args:
      name: name of the program, which starts its error messages.
      body: function that does the work; a number that it returns is the exit code.
      debug: print the traceback of errors, too.
    """
    with tolerant_output():
        try:
            return body() or 0
        except UserError as error:
            if debug:
                traceback.print_exc()
            _print_error(name, str(error))
            return error.exit_code
        except OSError as error:
            if not debug and (of_bucket := translate(error)):
                _print_error(name, str(of_bucket))
                return of_bucket.exit_code
            if debug or error.errno not in _USER_ERRORS:
                raise
            where = "" if error.filename is None else f"{error.filename}: "
            _print_error(name, f"{where}{error.strerror}")
            return 2
        except KeyboardInterrupt as error:
            if debug:
                traceback.print_exc()
            print(f"{name}: interrupted", file=sys.stderr)
            return getattr(error, "exit_code", 130)
        except (RuntimeError, AssertionError):
            # JAX has no exception class of its own for a platform that cannot start.
            platform_error = _find_platform_error()
            if debug or platform_error is None:
                raise
            _print_error(name, platform_error)
            return 2
        except Exception as error:
            # Most errors of the libraries that reach buckets are not OSErrors.
            if debug or (of_bucket := translate(error)) is None:
                raise
            _print_error(name, str(of_bucket))
            return of_bucket.exit_code


def _print_error(name: str, message: str) -> None:
    # Messages may have line breaks.
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)


def _find_platform_error() -> str | None:
    """Returns why JAX cannot start its platform (CPU, GPU or TPU) here, or None if it can or is not used."""
    if "jax" not in sys.modules:
        return None
    try:
        sys.modules["jax"].devices()
        return None
    except (RuntimeError, AssertionError) as error:
        # For some platforms JAX raises only an empty AssertionError.
        reason = str(error).partition(" (set JAX_PLATFORMS")[0].rstrip(".") or "it is not installed"
    platforms = os.environ.get("JAX_PLATFORMS")
    if not platforms:
        return f"JAX cannot start its platform: {reason}. With JAX_PLATFORMS=cpu it runs on the CPU"
    return (
        f"JAX_PLATFORMS={platforms}: JAX cannot start this platform here: {reason}. Unset the variable to use the best "
        "device that JAX finds, or set JAX_PLATFORMS=cpu to run on the CPU"
    )
