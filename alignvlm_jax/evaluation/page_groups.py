"""Groups of questions that are answered together.

All questions about a page are in one group, even if they come from several records. The model then encodes the page
once (`inference/pages.py`).
"""

import hashlib
from collections.abc import Hashable, Iterator, Sequence


def digest_images(encoded_images: Sequence[bytes]) -> bytes:
    """Returns a digest of encoded images and their order; empty without images."""
    return b"".join(hashlib.blake2b(data, digest_size=16).digest() for data in encoded_images)


def group_by_page(pages: Sequence[Hashable], at_once: int) -> Iterator[list[int]]:
    """Yields groups of indices, each with at least `at_once` of them, except for the last group.

    before: pages a b a c b, at_once=2
    after:  [0, 2], [1, 4], [3]

    Args:
      pages: value for each question or document that is equal for equal pages; falsy for one without images.
      at_once: number of indices after which a group ends.
    """
    by_page: dict[Hashable, list[int]] = {}
    for index, page in enumerate(pages):
        # Whatever has no images is on its own. No page equals a tuple of an index and None.
        by_page.setdefault(page or (index, None), []).append(index)
    group: list[int] = []
    for indices in by_page.values():
        group += indices
        if len(group) >= at_once:
            yield group
            group = []
    if group:
        yield group
