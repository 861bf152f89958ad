"""Errors that the user can fix, and those that pass by themselves."""


class UserError(Exception):
    """Invalid input. The message says in one line what is wrong, where, and what to do about it.

    The command line prints the message and exits with `exit_code`.

    Attributes:
      exit_code: exit code of the command.
      is_common: whether every process of a run raises this error. They then wait for each other as they end.
    """

    exit_code = 2
    is_common = False


class TemporaryError(UserError):
    """A condition that passes without a change: the same command works later. Launchers repeat it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h
