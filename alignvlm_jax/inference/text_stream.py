"""Turns the tokens of an answer into text while they arrive, in whole characters, up to a stop text.

    tokens   "12", ".", "5", " ", <0xE2>, <0x82>, <0xAC>     stop = "EUR"
    pieces   "12", ".", "5", " ",     "",     "",    "€"

A piece is never retracted. What could still change is held back: bytes of an incomplete character, and the beginning of
a stop text. Text after a stop text is dropped, as is the stop text itself. The pieces and what `finish` returns are
together what decoding all tokens at once gives, up to the first stop text.

Tokens are decoded with those before them, because a tokenizer joins words in its own way: SentencePiece, for example,
drops the space before the first word of a text. Only the tokens of the last piece are decoded again, so a long answer
takes time in proportion to its length.

A run of byte tokens (<0xE2>) is held back until another token follows: if one of its bytes is invalid, decoding
replaces all of them.
"""

import re
from collections.abc import Sequence

from alignvlm_jax.data.chat import ChatTokenizer

_INCOMPLETE = "\ufffd"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class TextStream:
    """The text of one answer.

    Attributes:
      has_stopped: whether a stop text was found. Further tokens add no text.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._start = 0  # first token of the text that `push` decodes
        self._read = 0  # first token whose text is not in `_held` or returned yet
        self._held = ""  # text that may be the beginning of a stop text
        self.has_stopped = False

    def push(self, token: int) -> str:
        """Adds a token and returns the text that is certain now, which may be empty."""
        name = self._tokenizer.token_name(token)
        # Decoding skips these, so that bytes before and after them form one run.
        if self.has_stopped or name is None or token in self._tokenizer.special_ids:
            return ""
        self._tokens.append(int(token))
        return "" if _BYTE.fullmatch(name) else self._release(self._decode_complete())

    def finish(self) -> str:
        """Returns the rest of the text. An incomplete character becomes U+FFFD, as in `ChatTokenizer.decode`."""
        if self.has_stopped:
            return ""
        before = self._tokenizer.decode(self._tokens[self._start : self._read])
        rest = self._tokenizer.decode(self._tokens[self._start :])[len(before) :]
        self._read = len(self._tokens)
        piece = self._release(rest) + self._held
        self._held = ""
        return piece

    def _decode_complete(self) -> str:
        """Returns the text of the tokens since the last call, if it ends in a complete character."""
        before = self._tokenizer.decode(self._tokens[self._start : self._read])
        text = self._tokenizer.decode(self._tokens[self._start :])
        if len(text) <= len(before) or text.endswith(_INCOMPLETE):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return text[len(before) :]

    def _release(self, text: str) -> str:
        """Returns the part of the held and the new text that is certain; holds the beginning of a stop text back."""
        text = self._held + text
        found = [place for place in map(text.find, self._stop) if place >= 0]
        if found:
            self.has_stopped, self._held = True, ""
            return text[: min(found)]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest beginning of `stop`, but not all of it, with which the text ends."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
