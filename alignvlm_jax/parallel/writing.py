"""Takes the lease of an output for all processes of a run: process 0 takes it, and all learn whether it was refused."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

from alignvlm_jax.errors import TemporaryError, UserError
from alignvlm_jax.leases import one_writer
from alignvlm_jax.leases.lease import Lease
from alignvlm_jax.parallel import distributed

T = TypeVar("T")


@contextlib.contextmanager
def one_writer_of(output: str | os.PathLike, *, beside: bool = False) -> Iterator[Lease]:
    """Holds the lease of an output; see `one_writer.one_writer`. All processes must call it.

    Each process gets a lease, because each must check it before it completes its part. Only process 0 renews and
    releases it.
    """
    own = call_in_primary(lambda: one_writer.take(output, beside=beside))
    try:
        ticket = distributed.gather_json(own and own.ticket())[0]
        yield one_writer.with_ticket(output, ticket, beside=beside) if own is None else own
    finally:
        if own is not None:
            own.release()


def call_in_primary(function: Callable[[], T]) -> T | None:
    """Returns the result of a function in process 0, and None in the others. All processes must call it.

    Raises:
      UserError: if the function raises one; raised in every process.
    """
    result, error = None, None
    if distributed.is_primary():
        try:
            result = function()
        except UserError as own_error:
            error = own_error
    message, is_temporary = distributed.gather_json([error and str(error), isinstance(error, TemporaryError)])[0]
    if message is not None:
        error = error or (TemporaryError if is_temporary else UserError)(message)
        error.is_common = True
        raise error
    return result
