"""Records in JSON files, as a list, in an object like {"data": [...]} or one per line, found without parsing the file.

Files of a gigabyte are common. The elements of a list are found by their brackets alone. A slice is therefore a range
of bytes that a worker reads independently, and damage in one record (bytes that are not UTF-8, a missing comma) costs
only that record.

    [{"id": 1, "x": "}"}, {"id": 2}]        two elements: bytes 1-20 and 22-31

After a lost quotation mark, brackets and texts are swapped up to the end of the file. A record is therefore cut where
the next record seems to begin, judged by the first key (`}, {"id":`), if it is not valid JSON or has no end there.
"""

import contextlib
import itertools
import json
import mmap
import re
from array import array
from collections.abc import Callable, Iterator
from typing import Any

from alignvlm_jax.data.contents import HEAD_BYTES, describe_other_content
from alignvlm_jax.data.formats.conversation import (
    Conversation,
    FormatOptions,
    Refusal,
    Refused,
    Slice,
    expect_object,
    text_or_default,
)
from alignvlm_jax.data.paths import open_binary
from alignvlm_jax.locations import is_local

Buffer = bytes | mmap.mmap

_BYTE_ORDER_MARK = re.compile(rb"(?:\xef\xbb\xbf)?")
_LIST = re.compile(_BYTE_ORDER_MARK.pattern + rb"\s*\[")
# An object that holds the list of records, with only simple fields before and after it.
_STRING = rb'"(?:[^"\\]|\\.)*+"'
_WRAPPED_LIST = re.compile(
    _BYTE_ORDER_MARK.pattern
    + rb"\s*\{(?:[^][{}\"]|\{[^{}]*\}|" + _STRING + rb")*?"
    + rb'"(?:data|train|rows|records|samples|examples|instances)"\s*:\s*\[(?=\s*[]{])'
)  # fmt: skip
_END_OF_WRAPPED_LIST = re.compile(
    rb"\](?:\s*,\s*" + _STRING + rb"\s*:\s*(?:" + _STRING + rb'|\{[^{}]*\}|[^][{}",]+))*\s*\}\s*\Z'
)
_WRAPPER_BYTES = 2**16
_OBJECT = re.compile(_BYTE_ORDER_MARK.pattern + rb"\s*(\{[^\n]*)")
_NOT_SPACE = re.compile(rb"\S")
# In JSON, a string cannot span lines. After a lost quotation mark, the next line is therefore read correctly again.
_BRACKET_OR_STRING = re.compile(rb'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"|[][{}]')
_SPACE = b" \t\r\n"
# An element longer than this may contain the next record, because of a lost quotation mark. It is then searched for the
# start of a record, and again whenever its length doubles.
_FIRST_SEARCH_BYTES = 2**20
# Python itself refuses deep nesting, but at a depth that depends on its version, from one thousand to many.
_MAX_DEPTH = 500


def count_records(file: str) -> int:
    """Returns the number of records in a file."""
    with _map_file(file) as buffer:
        return sum(1 for _ in _spans(buffer))


def plan_file(file: str, options: FormatOptions, picks: list[int] | None = None) -> list[Slice]:
    """Returns slices of a file, or with `picks`, of the records with these numbers only."""
    with _map_file(file) as buffer:
        # Compact arrays, because a file may have millions of records.
        starts, stops = array("q"), array("q")
        for start, stop in _spans(buffer):
            starts.append(start)
            stops.append(stop)
    numbers = range(len(starts)) if picks is None else sorted(picks)
    slices = []
    for begin in range(0, len(numbers), options.records_per_shard):
        chosen = numbers[begin : begin + options.records_per_shard]
        first, last = chosen[0], chosen[-1]
        # `start` and `stop` of a slice span its records; `picks` is needed only if there are others between them.
        is_contiguous = last - first + 1 == len(chosen)
        slices.append(
            Slice(file, starts[first], stops[last], first, len(chosen), None if is_contiguous else tuple(chosen))
        )
    return slices


def read_slice(piece: Slice, options: FormatOptions) -> Iterator[tuple[int, Any | Refusal]]:
    """Yields the records of a slice with their numbers: parsed, or the `Refusal` of a record that cannot be parsed."""
    picks = None if piece.picks is None else set(piece.picks)
    with _map_file(piece.file) as buffer:
        for number, (start, stop) in enumerate(_spans(buffer, piece.start), piece.first):
            if start >= piece.stop:
                return
            if picks is not None and number not in picks:
                continue
            try:
                yield number, _parse(buffer, start, stop, options.max_record_bytes)
            except Refusal as refusal:
                yield number, refusal


def read_conversations(
    piece: Slice, options: FormatOptions, convert: Callable[[dict[str, Any], str, int], Conversation]
) -> Iterator[Conversation | Refused]:
    """Yields the conversations of a slice: `convert(record, where, number)` of each record, or its refusal."""
    for number, record in read_slice(piece, options):
        where = f"{piece.file}: record {number + 1}"
        try:
            if isinstance(record, Refusal):
                raise record
            yield convert(expect_object(record, "the record"), where, number)
        except Refusal as refusal:
            record_id = text_or_default(record.get("id"), "") if isinstance(record, dict) else ""
            yield Refused(where, record_id, refusal.kind, str(refusal))


def _parse(buffer: Buffer, start: int, stop: int, max_bytes: int) -> Any:
    """Returns the record in a range of bytes."""
    if start == 0 and (content := describe_other_content(buffer[:HEAD_BYTES], "json")):
        raise Refusal("damaged file", f"the file is {content}")
    if stop - start > max_bytes:
        raise Refusal("too large", f"the record has {stop - start} bytes, more than the limit of {max_bytes}")
    try:
        text = buffer[start:stop].decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal("text encoding", f"byte {error.start} of the record is not UTF-8 ({error.reason})") from error
    if _is_too_deep(text):
        raise Refusal("unreadable record", f"the record has lists or objects nested deeper than {_MAX_DEPTH} levels")
    try:
        return json.loads(text)
    except ValueError as error:
        why = f"the record is not valid JSON: {error}"
        if not text.lstrip().startswith(("{", "[")):
            why += f". It begins {text[:60]!r}. Store a table (CSV, TSV) as JSON lines, with an object for each row"
        raise Refusal("unreadable record", why) from error


def _is_too_deep(text: str) -> bool:
    """Returns whether lists and objects are nested deeper than `_MAX_DEPTH` levels."""
    if text.count("[") + text.count("{") <= _MAX_DEPTH:  # nearly every record
        return False
    steps = ((token[0] in b"{[") - (token[0] in b"}]") for token in _BRACKET_OR_STRING.finditer(text.encode()))
    return max(itertools.accumulate(steps), default=0) > _MAX_DEPTH


@contextlib.contextmanager
def _map_file(path: str) -> Iterator[Buffer]:
    """Yields the bytes of a file, mapped to memory where possible."""
    with open_binary(path) as file:
        if not is_local(path) or file.seek(0, 2) == 0:
            yield file.read()  # neither a file in a bucket nor an empty file can be mapped
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            yield buffer


def _spans(buffer: Buffer, start: int = 0) -> Iterator[tuple[int, int]]:
    """Yields the start and stop of each record, beginning with the record at `start`."""
    if describe_other_content(buffer[:HEAD_BYTES], "json"):
        yield 0, len(buffer)  # `_parse` refuses it and states the reason
        return
    records = _find_list(buffer)
    if records is None:
        yield from _lines(buffer, start or _BYTE_ORDER_MARK.match(buffer).end(), len(buffer))
    else:
        yield from _elements(buffer, start or records[0], records[1], _separator(buffer, records[0]))


def _find_list(buffer: Buffer) -> tuple[int, int] | None:
    """Returns the start and the stop of a list's elements, or None if every line is a record."""
    if opening_bracket := _LIST.match(buffer):
        # Strip the closing bracket and the white space around it.
        stop = len(buffer)
        while buffer[stop - 1 : stop] in (b" ", b"\t", b"\r", b"\n"):
            stop -= 1
        if buffer[stop - 1 : stop] == b"]" and stop > opening_bracket.end():
            stop -= 1
        return opening_bracket.end(), stop
    first_line = _OBJECT.match(buffer)
    if first_line is None or _NOT_SPACE.search(buffer, first_line.end()) and _is_json(first_line[1]):
        return None
    if wrapper := _WRAPPED_LIST.match(buffer, 0, _WRAPPER_BYTES):
        tail = max(wrapper.end(), len(buffer) - _WRAPPER_BYTES)
        end = _END_OF_WRAPPED_LIST.search(buffer, tail)
        return wrapper.end(), end.start() if end else len(buffer)
    # Records that span several lines, one after the other, as `jq` and `indent=2` write them.
    start = first_line.start(1)
    return (start, len(buffer)) if buffer[start : min(first_line.end(), start + 9)].strip() == b"{" else None


def _separator(buffer: Buffer, start: int) -> re.Pattern | None:
    """Returns a pattern of the end of one record and the first key of the next, or None if the first has no key."""
    # Records of one file nearly always begin with the same key.
    name = re.compile(rb'\s*\{\s*("[^"\\]*")\s*:').match(buffer, start)
    return name and re.compile(rb"\}\s*,\s*(?=\{\s*" + re.escape(name[1]) + rb"\s*:)")


def _lines(buffer: Buffer, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yields the lines that are not blank."""
    while start < stop:
        end = buffer.find(b"\n", start, stop)
        end = stop if end < 0 else end
        if buffer[start:end].strip(_SPACE):
            yield start, end
        start = end + 1


def _elements(buffer: Buffer, start: int, stop: int, separator: re.Pattern | None) -> Iterator[tuple[int, int]]:
    """Yields the elements of a list, without the list's own brackets.

    Anything else between two bracketed elements, except a comma, is also an element; it is refused later.
    """
    while start < stop:
        opening = next((t.start() for t in _tokens(buffer, start, stop) if t[0] in (b"{", b"[")), stop)
        yield from _between(buffer, start, opening)
        if opening < stop:
            start = _end_of_element(buffer, opening, stop, separator)
            yield opening, start
        else:
            start = stop


def _end_of_element(buffer: Buffer, start: int, stop: int, separator: re.Pattern | None) -> int:
    """Returns the end of the element that begins at `start`."""
    end, depth, next_search = None, 0, _FIRST_SEARCH_BYTES
    # Find the closing bracket. A very long element may have lost a quotation mark: look for the next record in it.
    for token in _tokens(buffer, start, stop):
        if token[0] in (b"{", b"["):
            depth += 1
        elif token[0] in (b"}", b"]"):
            depth -= 1
        if depth == 0:
            end = token.end()
            break
        if separator and token.start() - start > next_search:
            if separator.search(buffer, start, token.start()):
                break
            next_search *= 2
    # Cut the element before the next record if it has no end or is not valid JSON.
    next_record = separator and separator.search(buffer, start, end or stop)
    if next_record and (end is None or not _is_json(buffer[start:end])):
        return next_record.start() + 1
    return end or stop


def _tokens(buffer: Buffer, start: int, stop: int) -> Iterator[re.Match]:
    """Yields the brackets outside of strings, and the strings."""
    return _BRACKET_OR_STRING.finditer(buffer, start, stop)


def _is_json(text: bytes) -> bool:
    """Returns whether the bytes are valid JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _between(buffer: Buffer, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yields the span between two elements if it holds more than commas and white space."""
    between = buffer[start:stop]
    if content := between.strip(_SPACE + b","):
        start += between.index(content)
        yield start, start + len(content)
