"""Input formats for users' data, one module each; all of them yield the same `Conversation`.

A format has two functions. `plan` divides the input files into slices, each of which becomes one shard. `read` yields a
`Conversation` or a `Refused` for every record of a slice. Neither opens an image: `checks.check` does this for all
formats.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from alignvlm_jax.data.formats import bigdocs, docdownstream, llava, messages, webdataset
from alignvlm_jax.data.formats.conversation import Conversation, FormatOptions, Refused, Slice


def _no_files(files: Sequence[str]) -> list[str]:
    """Returns no files: most formats do not name other files."""
    return []


@dataclasses.dataclass(frozen=True)
class Format:
    """An input format.

    Attributes:
      plan: divides input files into slices.
      read: yields the conversations of a slice.
      suffixes: endings of the files that are read if the input is a folder.
      referenced_files: returns further files that the input files name.
    """

    plan: Callable[[Sequence[str], FormatOptions], list[Slice]]
    read: Callable[[Slice, FormatOptions], Iterator[Conversation | Refused]]
    suffixes: tuple[str, ...]
    referenced_files: Callable[[Sequence[str]], list[str]] = _no_files


FORMATS = {
    "llava": Format(llava.plan, llava.read, llava.SUFFIXES, llava.referenced_files),
    "docdownstream": Format(docdownstream.plan, docdownstream.read, docdownstream.SUFFIXES),
    "bigdocs": Format(bigdocs.plan, bigdocs.read, bigdocs.SUFFIXES),
    "messages": Format(messages.plan, messages.read, messages.SUFFIXES, messages.referenced_files),
    "webdataset": Format(webdataset.plan, webdataset.read, webdataset.SUFFIXES),
}
