"""Errors that the user can fix."""


class UserError(Exception):
    """Invalid input. The message says in one line what is wrong, where, and what to do about it.

    The command line prints the message and exits with code 2.
    """
