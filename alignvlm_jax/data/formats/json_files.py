"""Records in JSON files, a list of them or one a line, found without parsing the whole file.

Files of a gigabyte are common. The list's elements are found by their brackets alone, so that a slice is a range of
bytes which a worker reads by itself, and damage in one record (bytes that are not UTF-8, a missing comma) costs that
record and no other.

    [{"id": 1, "x": "}"}, {"id": 2}]        two elements: bytes 1-20 and 22-31

After a lost quotation mark brackets and texts change places to the end of the file. A record that does not close where
another seems to begin, by its first name (`}, {"id":`), and is not valid JSON either, is therefore cut there.
"""

import contextlib
import json
import mmap
import re
from array import array
from collections.abc import Callable, Iterator
from typing import Any

from alignvlm_jax.data.formats.conversation import (
    Conversation,
    FormatOptions,
    Refusal,
    Refused,
    Slice,
    expect_object,
    name_of,
)
from alignvlm_jax.data.paths import is_local, open_binary

Buffer = bytes | mmap.mmap

_BYTE_ORDER_MARK = re.compile(rb"(?:\xef\xbb\xbf)?")
_LIST = re.compile(_BYTE_ORDER_MARK.pattern + rb"\s*\[")
# A string ends with its line at the latest: after a lost quotation mark the next line is understood again.
_BRACKET_OR_STRING = re.compile(rb'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"|[][{}]')
_SPACE = b" \t\r\n"
# In a record longer than this another is looked for, then again whenever it has doubled.
_PATIENCE = 2**20


def count_records(file: str) -> int:
    """How many records are in the file."""
    with _mapped(file) as buffer:
        return sum(1 for _ in _spans(buffer))


def plan_file(file: str, options: FormatOptions, picks: list[int] | None = None) -> list[Slice]:
    """Slices of the file; of those records only that `picks` names, if it is given."""
    with _mapped(file) as buffer:
        starts, stops = array("q"), array("q")
        for start, stop in _spans(buffer):
            starts.append(start)
            stops.append(stop)
    numbers = range(len(starts)) if picks is None else sorted(picks)
    slices = []
    for at in range(0, len(numbers), options.records_per_shard):
        chosen = numbers[at : at + options.records_per_shard]
        first, last = chosen[0], chosen[-1]
        everything = last - first + 1 == len(chosen)
        slices.append(
            Slice(file, starts[first], stops[last], first, len(chosen), None if everything else tuple(chosen))
        )
    return slices


def read_slice(piece: Slice, options: FormatOptions) -> Iterator[tuple[int, Any | Refusal]]:
    """The records of a slice, parsed, with their numbers; in place of one that cannot be parsed, why."""
    wanted = None if piece.picks is None else set(piece.picks)
    with _mapped(piece.file) as buffer:
        for number, (start, stop) in enumerate(_spans(buffer, piece.start), piece.first):
            if start >= piece.stop:
                return
            if wanted is not None and number not in wanted:
                continue
            try:
                yield number, _parse(buffer, start, stop, options.max_record_bytes)
            except Refusal as refusal:
                yield number, refusal


def read_conversations(
    piece: Slice, options: FormatOptions, convert: Callable[[dict[str, Any], str, int], Conversation]
) -> Iterator[Conversation | Refused]:
    """The conversations of a slice: of each record `convert(record, where, number)`, unless it raises a `Refusal`."""
    for number, record in read_slice(piece, options):
        where = f"{piece.file}: record {number + 1}"
        try:
            if isinstance(record, Refusal):
                raise record
            yield convert(expect_object(record, "the record"), where, number)
        except Refusal as refusal:
            record_id = name_of(record.get("id"), "") if isinstance(record, dict) else ""
            yield Refused(where, record_id, refusal.kind, str(refusal))


def _parse(buffer: Buffer, start: int, stop: int, max_bytes: int) -> Any:
    if stop - start > max_bytes:
        raise Refusal("too large", f"the record has {stop - start} bytes, more than the limit of {max_bytes}")
    try:
        text = buffer[start:stop].decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal("text encoding", f"not UTF-8 at byte {error.start} of the record ({error.reason})") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: ten thousand nested lists.
        raise Refusal("unreadable record", f"not valid JSON: {error}") from error


@contextlib.contextmanager
def _mapped(path: str) -> Iterator[Buffer]:
    with open_binary(path) as file:
        if not is_local(path) or file.seek(0, 2) == 0:
            yield file.read()  # What is in a bucket, or empty, cannot be mapped.
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            yield buffer


def _spans(buffer: Buffer, start: int = 0) -> Iterator[tuple[int, int]]:
    """Where each record of the file starts and stops, from the one that starts there on."""
    beginning = _LIST.match(buffer)
    if beginning is None:
        yield from _lines(buffer, start or _BYTE_ORDER_MARK.match(buffer).end(), len(buffer))
        return
    stop = len(buffer)
    while buffer[stop - 1 : stop] in (b" ", b"\t", b"\r", b"\n"):
        stop -= 1
    if buffer[stop - 1 : stop] == b"]" and stop > beginning.end():
        stop -= 1
    yield from _elements(buffer, start or beginning.end(), stop, _border(buffer, beginning.end()))


def _border(buffer: Buffer, start: int) -> re.Pattern | None:
    """What stands between two records, if all begin with the same name as the first."""
    name = re.compile(rb'\s*\{\s*("[^"\\]*")\s*:').match(buffer, start)
    return name and re.compile(rb"\}\s*,\s*(?=\{\s*" + re.escape(name[1]) + rb"\s*:)")


def _lines(buffer: Buffer, start: int, stop: int) -> Iterator[tuple[int, int]]:
    while start < stop:
        end = buffer.find(b"\n", start, stop)
        end = stop if end < 0 else end
        if buffer[start:end].strip(_SPACE):
            yield start, end
        start = end + 1


def _elements(buffer: Buffer, start: int, stop: int, border: re.Pattern | None) -> Iterator[tuple[int, int]]:
    """The elements of a list, its own brackets left out.

    Whatever stands between two bracketed elements and is not a comma is an element too, and no conversation.
    """
    while start < stop:
        opening = next((t.start() for t in _tokens(buffer, start, stop) if t[0] in (b"{", b"[")), stop)
        yield from _between(buffer, start, opening)
        if opening < stop:
            start = _end_of_element(buffer, opening, stop, border)
            yield opening, start
        else:
            start = stop


def _end_of_element(buffer: Buffer, start: int, stop: int, border: re.Pattern | None) -> int:
    end, depth, patience = None, 0, _PATIENCE
    for token in _tokens(buffer, start, stop):
        if token[0] in (b"{", b"["):
            depth += 1
        elif token[0] in (b"}", b"]"):
            depth -= 1
        if depth == 0:
            end = token.end()
            break
        if border and token.start() - start > patience:
            if border.search(buffer, start, token.start()):
                break
            patience *= 2
    next_one = border and border.search(buffer, start, end or stop)
    if next_one and (end is None or not _is_json(buffer[start:end])):
        return next_one.start() + 1
    return end or stop


def _tokens(buffer: Buffer, start: int, stop: int) -> Iterator[re.Match]:
    return _BRACKET_OR_STRING.finditer(buffer, start, stop)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _between(buffer: Buffer, start: int, stop: int) -> Iterator[tuple[int, int]]:
    between = buffer[start:stop]
    if content := between.strip(_SPACE + b","):
        start += between.index(content)
        yield start, start + len(content)
