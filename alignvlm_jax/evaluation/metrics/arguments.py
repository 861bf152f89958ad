"""What every metric asks of its arguments, and what is raised where an official scorer would stop."""

from collections.abc import Sequence

from alignvlm_jax.errors import UserError


class ScorerAborted(UserError, AssertionError):
    """The official scorer ends its whole run at this question. A runner may rather count it as wrong, and say so."""


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Refuses one string where several are meant: its letters would be scored, and the score would look plausible."""
    if isinstance(texts, str):
        raise UserError(f"{name} is the string {texts!r}: give a list of strings, [{texts!r}]")


def accepted_answers(references: str | Sequence[str]) -> Sequence[str]:
    """The accepted answers as a list; a string is the only one.

    Raises:
      ScorerAborted: there are none. The official scorers take a minimum, a maximum or a first one of them.
    """
    if isinstance(references, str):
        return (references,)
    if not len(references):
        raise ScorerAborted("references is empty: a question needs at least one accepted answer")
    return references
