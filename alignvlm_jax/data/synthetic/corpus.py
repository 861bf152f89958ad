"""A corpus of synthetic documents on disk: drawn once, by several processes, then read by any number of runs."""

import collections
import concurrent.futures
import functools
import hashlib
import io
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from alignvlm_jax.data import store
from alignvlm_jax.data.synthetic.document import draw_document
from alignvlm_jax.data.synthetic.records import draw_records
from alignvlm_jax.data.synthetic.values import SPLITS
from alignvlm_jax.errors import UserError

FEATURES = {
    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
    "id": tfds.features.Text(),
    "source": tfds.features.Text(),  # the family
    "font": tfds.features.Text(),
    "transcription": tfds.features.Text(),
    "questions": tfds.features.Sequence(tfds.features.Text()),
    "answers": tfds.features.Sequence(tfds.features.Text()),
}

_KIND = "synthetic documents"
_DOCUMENTS_PER_CALL = 64
_WORTH_A_PROCESS = 1_000  # documents; fewer are drawn before a second process has started
_MOST_PROCESSES = 8


def build_corpus(
    folder: str | Path,
    *,
    seed: int,
    sizes: Mapping[str, int],
    progress: bool = True,
    processes: int | None = None,
) -> Path:
    """A data set of so many documents a split in this folder, for `store.open_dataset(folder, split)`.

    A corpus drawn there before with the same parameters is kept as it is; one drawn with others is drawn afresh. The
    records do not depend on the number of processes.
    """
    _check(sizes)
    recipe = {"kind": _KIND, "seed": seed, "sizes": dict(sizes), "drawing": _fingerprint(seed)}
    drawings = {split: (functools.partial(draw_records, seed, split), size) for split, size in sizes.items()}
    return write_corpus(folder, recipe, drawings, description=__doc__, progress=progress, processes=processes)


def write_corpus(
    folder: str | Path,
    recipe: Mapping[str, Any],
    drawings: Mapping[str, tuple[Callable[[int, int], list[dict[str, Any]]], int]],
    *,
    description: str,
    progress: bool = True,
    processes: int | None = None,
) -> Path:
    """A data set of drawn documents of any kind; one that is there already and has the same recipe is kept as it is.

    Args:
      folder: where to; what it holds must be of the same kind.
      recipe: what the records follow from, JSON; "kind" says what they are. The data set keeps it as its metadata.
      drawings: for each split, a function (first, one after the last) -> records, which other processes may call, and
        the number of records.
      description: of the data set.
      progress: whether to show a bar.
      processes: that draw; None takes as many as there are cores and work for.
    """
    folder = Path(folder)
    if store.is_occupied(folder):
        found = store.read_metadata(folder)
        if found == recipe:
            return folder
        if found.get("kind") != recipe["kind"]:
            raise UserError(f"{folder} holds another kind of data set: choose another folder for {recipe['kind']}")
        shutil.rmtree(folder)

    total = sum(size for _, size in drawings.values())
    processes = processes or min(os.cpu_count() or 1, _MOST_PROCESSES, max(1, total // _WORTH_A_PROCESS))
    name = recipe["kind"].replace(" ", "_")
    with (
        tqdm(total=total, desc="drawing documents", unit="page", mininterval=0.5, disable=not progress) as bar,
        _drawing(processes) as executor,
    ):
        splits = {split: _records(executor, draw, size, processes, bar) for split, (draw, size) in drawings.items()}
        store.write_dataset(folder, FEATURES, splits, name=name, description=description, metadata=dict(recipe))
    return folder


def _check(sizes: Mapping[str, int]) -> None:
    for split, size in sizes.items():
        if split not in SPLITS:
            raise UserError(f"sizes: no split {split!r} of synthetic documents: one of {', '.join(SPLITS)}")
        if size < 1:
            raise UserError(f"sizes.{split}: expected at least one document, got {size}")


def _fingerprint(seed: int) -> str:
    """Tells drawings apart: a changed program must not go on with the pages of the old one."""
    digest = hashlib.sha256()
    for index in range(16):
        document = draw_document(seed, "train", index, render=False)
        digest.update(repr((document.font, document.transcription, document.questions)).encode())
        digest.update(repr([round(edge) for glyph in document.glyphs for edge in glyph[1:]]).encode())
    return digest.hexdigest()[:16]


class _Here(concurrent.futures.Executor):
    """Draws in this process, when asked for the result."""

    def submit(self, function, /, *arguments):
        future = concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future


def _drawing(processes: int) -> concurrent.futures.Executor:
    if processes == 1:
        return _Here()
    # "spawn": a fork of a process in which jax has started its threads can hang.
    return concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))


def _records(
    executor: concurrent.futures.Executor,
    draw: Callable[[int, int], list[dict[str, Any]]],
    size: int,
    processes: int,
    bar: tqdm,
) -> Iterator[dict[str, Any]]:
    """The documents of a split in order, drawn a few calls ahead of the writing."""
    starts = iter(range(0, size, _DOCUMENTS_PER_CALL))
    ahead = collections.deque()
    while True:
        while len(ahead) < 2 * processes and (start := next(starts, None)) is not None:
            ahead.append(executor.submit(draw, start, min(start + _DOCUMENTS_PER_CALL, size)))
        if not ahead:
            return
        for record in ahead.popleft().result():
            yield record | {"image": io.BytesIO(record["image"])}
            bar.update()
