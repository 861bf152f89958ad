"""Prompts about the same images as a page and its branches, and the batches in which they are answered.

The page of a group of prompts is the longest common beginning of their tokens that contains every image and leaves
each prompt at least one token of its own. The other tokens of a prompt are its branch. Earlier turns that the prompts
have in common belong to the page:

    tokens   <begin> <user> i i i What is the total? <assistant>       page      <begin> <user> i i i What is the
             <begin> <user> i i i What is the date?  <assistant>       branches  total? <assistant> | date? <assistant>

A batch has P pages with Q branches each, and P * Q is at most the number of rows that are decoded at once. Pages of
similar size and with a similar number of branches share a batch, and P and Q are rounded to a few numbers, so only a
few shapes are compiled. A page with more branches than fit is read once, and answers them in several rounds.

A prompt that shares its images with no other is answered alone: it is a page without branches.

Axes: P pages, Q branches of a page, K views.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from alignvlm_jax.inference.prompts import Batch, Prompt, pad_prompts, power_of_two

_MIN_BRANCH = 8  # Shorter branches are padded to the same shape.


class Group(NamedTuple):
    """Prompts that share a page.

    Attributes:
      prompts: indices of the prompts.
      page_length: number of tokens of the page; all tokens for a single prompt.
    """

    prompts: tuple[int, ...]
    page_length: int


class PageBatch(NamedTuple):
    """Groups that are answered together.

    Attributes:
      groups: the groups, one per page.
      num_pages: number of pages P, with padding. A page with K views counts once.
      num_branches: number of branches Q of each page in a round, with padding; 0 if every group is a single prompt.
    """

    groups: tuple[Group, ...]
    num_pages: int
    num_branches: int

    def rounds(self) -> Iterator[list[tuple[int, ...]]]:
        """Yields for each round the prompts of every page, at most Q of them; some pages may have none left."""
        size = self.num_branches
        for start in range(0, max(len(group.prompts) for group in self.groups), size):
            yield [group.prompts[start : start + size] for group in self.groups]


def group_prompts(prompts: Sequence[Prompt]) -> list[Group]:
    """Returns groups of prompts that share a page; every prompt is in one of them.

    Prompts share a page if all views of their tiles, and all tokens up to the last image, are equal. Prompts without
    images share one if they have at least half of their tokens in common.
    """
    digests = _Digests()
    by_images: dict[bytes, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_images.setdefault(_images_key(prompt, digests), []).append(index)
    groups = []
    for indices in by_images.values():
        # Branches of similar length end up in the same round.
        indices = sorted(indices, key=lambda i: len(prompts[i].tokens))
        length = _common_length([prompts[i] for i in indices])
        if len(indices) > 1 and _is_shared(prompts[indices[-1]], length):
            groups.append(Group(tuple(indices), length))
        else:
            groups += [Group((i,), len(prompts[i].tokens)) for i in indices]
    return groups


def plan_batches(
    prompts: Sequence[Prompt], groups: Sequence[Group], *, batch_size: int, shards: int = 1
) -> list[PageBatch]:
    """Returns batches that answer all groups.

    Args:
      prompts: the prompts.
      groups: groups of their indices.
      batch_size: number of rows that are decoded at once. A prompt with K views takes K of them.
      shards: number of pieces into which the pages of a batch are split. P is a multiple of it, so it may take more
        rows. A group is split if there are fewer pages than pieces.
    """
    batches = []
    # All prompts of a batch have the same number of views. Those without branches are apart from those with.
    classes: dict[tuple[bool, int], list[Group]] = {}
    for group in groups:
        classes.setdefault((len(group.prompts) > 1, prompts[group.prompts[0]].num_views), []).append(group)
    for (has_branches, views), members in sorted(classes.items()):
        capacity = max(1, batch_size // views)
        plan = _with_branches if has_branches else _alone
        batches += plan(prompts, members, capacity, shards)
    return batches


def _alone(prompts: Sequence[Prompt], groups: list[Group], capacity: int, shards: int) -> Iterator[PageBatch]:
    """Yields batches of single prompts. Prompts of similar size share one, which keeps padding small."""
    groups = sorted(groups, key=lambda group: (len(prompts[group.prompts[0]].tiles), group.page_length))
    for start in range(0, len(groups), capacity):
        taken = groups[start : start + capacity]
        rows = min(capacity, power_of_two(len(taken)))
        yield PageBatch(tuple(taken), _round_up(rows, shards), 0)


def _with_branches(prompts: Sequence[Prompt], groups: list[Group], capacity: int, shards: int) -> Iterator[PageBatch]:
    """Yields batches of pages with branches: those with most tiles first, and among them those with most branches."""
    limit = max(1, capacity // shards)

    def size(group: Group):
        longest = len(prompts[group.prompts[-1]].tokens) - group.page_length
        tiles = rounded_count(len(prompts[group.prompts[0]].tiles))
        return tiles, _branches(len(group.prompts), limit), group.page_length, longest

    groups = sorted(groups, key=size, reverse=True)
    while groups:
        num_prompts = len(groups[0].prompts)
        pages = shards * max(1, capacity // (shards * _branches(num_prompts, limit)))
        # Pages with fewer tiles may have more branches than the first one. They begin the next batch.
        larger = (i for i, group in enumerate(groups[:pages]) if len(group.prompts) > num_prompts)
        end = next(larger, pages)
        taken, groups = groups[:end], groups[end:]
        if len(taken) % shards:
            taken = _split(taken, _round_up(len(taken), shards))
        num_pages = min(pages, shards * rounded_count(-(-len(taken) // shards)))
        yield PageBatch(tuple(taken), num_pages, _branches(max(len(group.prompts) for group in taken), limit))


def _split(groups: list[Group], number: int) -> list[Group]:
    """Returns at most `number` groups with the same prompts: the largest groups are split in two, again and again."""
    groups = list(groups)
    while len(groups) < number:
        groups.sort(key=lambda group: len(group.prompts))
        if len(groups[-1].prompts) == 1:
            break
        largest = groups.pop()
        middle = len(largest.prompts) // 2
        parts = largest.prompts[:middle], largest.prompts[middle:]
        groups += [largest._replace(prompts=part) for part in parts]
    return groups


def _branches(num_prompts: int, limit: int) -> int:
    """Returns Q for a page with a number of prompts: as few rounds of at most `limit` as possible, of equal size."""
    rounds = -(-num_prompts // limit)
    return min(limit, rounded_count(-(-num_prompts // rounds)))


def rounded_count(number: int) -> int:
    """Returns the smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... that is not less than the number."""
    power = power_of_two(number)
    return power * 3 // 4 if power >= 4 and number <= power * 3 // 4 else power


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def pad_pages(prompts: Sequence[Prompt], batch: PageBatch, *, tile_size: int, pad_id: int) -> Batch:
    """Returns a batch with the P pages as rows, or P * K rows with views; those beyond the pages are padding."""
    pages = []
    for group in batch.groups:
        prompt, end = prompts[group.prompts[0]], group.page_length
        page = dataclasses.replace(prompt, tokens=prompt.tokens[:end], visual_index=prompt.visual_index[:end])
        pages += page.views()
    rows = batch.num_pages * len(pages) // len(batch.groups)
    # The length of most pages is that of their images, so there are few different ones.
    longest = max(len(page.tokens) for page in pages)
    length = _round_up(longest, min(64, max(16, power_of_two(longest) // 16)))
    num_tiles = rounded_count(max(1, *(len(page.tiles) for page in pages)))
    return pad_prompts(pages, rows=rows, tile_size=tile_size, pad_id=pad_id, length=length, num_tiles=num_tiles)


def pad_branches(
    prompts: Sequence[Prompt], batch: PageBatch, indices: Sequence[Sequence[int]], *, pad_id: int
) -> Batch:
    """Returns a batch with the branches of a round as rows, in the order [P, K, Q].

    Args:
      prompts: the prompts.
      batch: batch of the pages.
      indices: prompts of each page in this round, from `PageBatch.rounds`.
      pad_id: token that pads a row.
    """
    views = prompts[batch.groups[0].prompts[0]].num_views
    branches = {
        (page, branch): prompts[i].tokens[batch.groups[page].page_length :]
        for page, of_page in enumerate(indices)
        for branch, i in enumerate(of_page)
    }
    length = rounded_count(max(_MIN_BRANCH, *map(len, branches.values())))
    shape = (batch.num_pages, batch.num_branches, length)
    tokens, segment_ids = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
    for place, branch in branches.items():
        tokens[place][: len(branch)] = branch
        segment_ids[place][: len(branch)] = 1
    page_lengths = np.zeros(batch.num_pages, np.int32)
    page_lengths[: len(batch.groups)] = [group.page_length for group in batch.groups]
    positions = page_lengths[:, None, None] + np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    fields = dict(tokens=tokens, segment_ids=segment_ids, positions=positions)
    return {name: np.repeat(field, views, axis=0).reshape(-1, length) for name, field in fields.items()}


class _Digests:
    """Digests of the content of arrays, each computed once per array object."""

    def __init__(self):
        self._known: dict[int, tuple[np.ndarray, bytes]] = {}

    def __call__(self, array: np.ndarray | None) -> bytes:
        if array is None:
            return b""
        if id(array) not in self._known:
            digest = hashlib.sha256(repr((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array))
            # With the array itself, so that no other object gets its id.
            self._known[id(array)] = array, digest.digest()
        return self._known[id(array)][1]


def _images_key(prompt: Prompt, digests: _Digests) -> bytes:
    """Returns a digest of everything that the page of a prompt must contain."""
    images = [prompt.tiles, prompt.tile_valid_hw, prompt.other_views, *(prompt.resampling or ())]
    end = _end_of_images(prompt)
    start = np.stack([prompt.tokens[:end], prompt.visual_index[:end]])
    return b"".join(map(digests, images)) + hashlib.sha256(start.astype(np.int64).tobytes()).digest()


def _end_of_images(prompt: Prompt) -> int:
    """Returns the position after the last visual token; 0 without any."""
    return int(np.flatnonzero(prompt.visual_index >= 0)[-1]) + 1 if np.any(prompt.visual_index >= 0) else 0


def _is_shared(longest: Prompt, length: int) -> bool:
    """Returns whether a page of this length is worth sharing, given the longest of its prompts."""
    if not len(longest.tiles):
        return 2 * length >= len(longest.tokens)
    # A prompt that ends with an image has no token of its own after it.
    return length >= _end_of_images(longest)


def _common_length(prompts: Sequence[Prompt]) -> int:
    """Returns the number of tokens of the page; 0 if the prompts have none in common.

    Args:
      prompts: prompts with equal tokens up to the last image, the shortest first.
    """
    # The last token of every prompt is its own. After the last image, all positions are text.
    length = len(prompts[0].tokens) - 1
    first = prompts[0].tokens[:length]
    is_common = np.ones(length, bool)
    for prompt in prompts[1:]:
        is_common &= prompt.tokens[:length] == first
    return length if is_common.all() else int(np.argmin(is_common))
