"""Cuts texts for reports, so that a record with a megabyte in the wrong place makes a short line."""

import json

_MARK = " ... "


def shorten(text: str, max_bytes: int) -> str:
    """Returns a text of at most `max_bytes` in JSON (ASCII, with escapes); what is too long loses its middle."""
    # JSON has at least one byte for each character.
    if len(text) <= max_bytes and _json_bytes(text) <= max_bytes:
        return text
    budget = max_bytes - len(_MARK)
    begin = _take(text[:budget], budget * 2 // 3)
    end = _take(text[-budget:][::-1], budget - budget * 2 // 3)[::-1]
    return begin + _MARK + end


def _take(text: str, budget: int) -> str:
    """Returns the longest beginning of a text that has at most this many bytes in JSON."""
    used = 0
    for i, character in enumerate(text):
        used += _json_bytes(character)
        if used > budget:
            return text[:i]
    return text


def _json_bytes(text: str) -> int:
    """Returns the length of a text in JSON, without its quotation marks."""
    return len(json.dumps(text)) - 2
