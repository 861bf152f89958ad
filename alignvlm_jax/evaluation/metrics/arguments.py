"""Checks of the metrics' arguments, and the error for answers at which an official scorer would stop."""

from collections.abc import Sequence

from alignvlm_jax.errors import UserError


class ScorerAborted(UserError, AssertionError):
    """Raised at an answer that ends the whole run of the official scorer.

    A runner may count the answer as wrong instead, and report it.
    """


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Refuses a single string in place of a list of strings.

    Raises:
      UserError: if `texts` is a string.
    """
    # A string is a sequence too: its letters would be scored one by one, and the score would look plausible.
    if isinstance(texts, str):
        raise UserError(f"{name}: expected a list of strings, got the string {texts!r}. Pass [{texts!r}]")


def accepted_answers(references: str | Sequence[str]) -> Sequence[str]:
    """Returns the accepted answers as a sequence. A single string is taken as the only accepted answer.

    Raises:
      ScorerAborted: if there are none. The official scorers fail too: they take the minimum, the maximum or the first.
    """
    if isinstance(references, str):
        return (references,)
    if not len(references):
        raise ScorerAborted("references is empty; a question needs at least one accepted answer")
    return references
