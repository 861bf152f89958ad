"""The one exception that means "the user can fix this": the command line prints it as a line and exits with 2."""


class UserError(Exception):
    """Bad input, said in one line: what was wrong, where, and what to do about it."""
