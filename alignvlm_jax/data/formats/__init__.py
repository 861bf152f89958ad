"""What users' data look like on disk, one module a format, all turned into the same `Conversation`.

A format has two functions. `plan` looks at the input files and cuts them into slices, each of which becomes one shard;
`read` yields what is in a slice, a `Conversation` or a `Refused` for every record that is there. Neither opens an
image: `checks.check` does, in one place for all formats.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from alignvlm_jax.data.formats import bigdocs, docdownstream, llava, messages, webdataset
from alignvlm_jax.data.formats.conversation import Conversation, FormatOptions, Refused, Slice


def _nothing_behind(files: Sequence[str]) -> list[str]:
    return []


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to store conversations.

    plan, read: see above.
    suffixes: which files of a folder are taken as input.
    files_behind: further files that the input files name.
    """

    plan: Callable[[Sequence[str], FormatOptions], list[Slice]]
    read: Callable[[Slice, FormatOptions], Iterator[Conversation | Refused]]
    suffixes: tuple[str, ...]
    files_behind: Callable[[Sequence[str]], list[str]] = _nothing_behind


FORMATS = {
    "llava": Format(llava.plan, llava.read, llava.SUFFIXES, llava.files_behind),
    "docdownstream": Format(docdownstream.plan, docdownstream.read, docdownstream.SUFFIXES),
    "bigdocs": Format(bigdocs.plan, bigdocs.read, bigdocs.SUFFIXES),
    "messages": Format(messages.plan, messages.read, messages.SUFFIXES),
    "webdataset": Format(webdataset.plan, webdataset.read, webdataset.SUFFIXES),
}
