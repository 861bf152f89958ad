"""Users' data become a data set: read, checked and written in parallel, and gone on with where it stopped.

    recipe = Recipe("llava", ("llava_v1_5_mix665k.json",), limits=Limits(image_root="playground/data"))
    prepare(recipe, "data/llava")          -> data/llava, which store.open_dataset reads

The input is cut into slices, each of which becomes one shard (`shards.py`), noted when it is finished
(`prepare_notes.py`). A run that is killed and started again ends with the same files as one that is not. A record of
the data set is

    id, source      text
    images          a list of the bytes of image files, as they were
    conversation    JSON text: messages as `chat.ChatTokenizer` takes them

The conversation is one JSON text and not a sequence of roles and texts, because TFDS without TensorFlow reads it a
quarter faster (114 against 149 microseconds a record of eight messages and 60 kB, parsing included), and because an
image's place and the word `<image>` typed by a user remain two things.

Every record of the input is either in the data set or a line of `OUT/rejects.jsonl`, which says where it was and why.
"""

import dataclasses
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from alignvlm_jax.data import store
from alignvlm_jax.data.formats import FORMATS
from alignvlm_jax.data.formats.checks import Limits, check
from alignvlm_jax.data.formats.conversation import FormatOptions, Refusal, Refused, Slice
from alignvlm_jax.data.paths import atomic_file, find_files, status
from alignvlm_jax.data.prepare_notes import Notes, Summary
from alignvlm_jax.data.shards import INFO_FILE, ShardedDataset
from alignvlm_jax.data.workers import WorkerDied, run_tasks
from alignvlm_jax.errors import UserError

NAME = "conversations"
REJECTS_FILE = "rejects.jsonl"
DEFAULT_MAX_REJECTS = 0.01

# So many records must have been seen before a share of refused ones says anything about the whole.
_MIN_RECORDS_TO_JUDGE = 1000

FEATURES = {
    "id": tfds.features.Text(),
    "source": tfds.features.Text(),
    "conversation": tfds.features.Text(),
    # Not tfds.features.Image, whose readers would decode to pixels and fail at a TIFF or a palette.
    "images": tfds.features.Sequence(tfds.features.Scalar(dtype=np.object_)),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is to be converted and how; the data set depends on this alone.

    format: one of `formats.FORMATS`.
    inputs: files, folders of them, or patterns with `*`.
    split: the name of the split to write.
    options, limits: see there; `limits.image_root` is where image paths start from.
    """

    format: str
    inputs: tuple[str, ...]
    split: str = "train"
    options: FormatOptions = FormatOptions()
    limits: Limits = Limits()


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be done, and where the outcome goes."""

    recipe: Recipe
    out: str

    @property
    def notes(self) -> Notes:
        return Notes(epath.Path(self.out))

    @property
    def dataset(self) -> ShardedDataset:
        return ShardedDataset(epath.Path(self.out), NAME, self.recipe.split, tfds.features.FeaturesDict(FEATURES))


Task = tuple[int, Slice]
Converter = Callable[[Job, Sequence[Task]], Iterable[Summary]]


def prepare(
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    max_rejects: float = DEFAULT_MAX_REJECTS,
    progress: bool = True,
    convert: Converter | None = None,
) -> Summary:
    """Convert the input to a data set in the folder `out`, or go on with converting it.

    Args:
      recipe: what and how.
      out: the folder of the data set; one that holds the same work, finished or not, or nothing.
      max_rejects: stop if a larger share of the records is refused.
      progress: show a bar.
      convert: has slices converted, and yields the summary of each when it is done; by default `in_processes()`.
    """
    job = Job(recipe, os.fspath(out))
    _check(recipe, max_rejects)
    files = _input_files(recipe)
    fingerprint = _fingerprint(recipe, files)
    if (done := _finished(job, fingerprint)) is not None:
        return done
    slices = _plan(job, files, fingerprint)
    summary = _convert(job, slices, convert or in_processes(), max_rejects, progress)
    notes = job.notes
    _write_rejects(job)
    if summary.num_rejected > max_rejects * summary.total:
        notes.forget_rejected()
        raise UserError(_too_many_rejects(summary, max_rejects, job))
    if not summary.accepted:
        raise UserError(f"{', '.join(recipe.inputs)}: no records to make a data set of")
    job.dataset.finish(
        [notes.shard(index) for index in range(len(slices))],
        notes.folder,
        description="Conversations about images, prepared by alignvlm_jax.",
        metadata={"fingerprint": fingerprint, "recipe": _plain(recipe)} | dataclasses.asdict(summary),
    )
    notes.clear()
    return summary


def in_processes(processes: int | None = None) -> Converter:
    """Converts on this machine, in so many processes; by default one a core."""

    def convert(job: Job, tasks: Sequence[Task]) -> Iterator[Summary]:
        try:
            function = functools.partial(convert_slice, job)
            for _, summary in run_tasks(function, tasks, processes or os.cpu_count() or 1):
                yield summary
        except WorkerDied as error:
            files = ", ".join(sorted({piece.file for _, piece in error.tasks}))
            raise UserError(
                f"a process died (was it out of memory?) at work on one of {files}; the same command goes on from here"
            ) from error

    return convert


def convert_slice(job: Job, task: Task) -> Summary:
    """Write the shard of a slice, and note that it is there and what was refused."""
    (index, piece), recipe = task, job.recipe
    root = recipe.limits.image_root or str(epath.Path(piece.file).parent)
    rejects = []

    def accepted() -> Iterator[dict[str, Any]]:
        for found in FORMATS[recipe.format].read(piece, recipe.options):
            if isinstance(found, Refused):
                rejects.append(found)
                continue
            try:
                record = check(found, root, recipe.limits)
            except Refusal as refusal:
                rejects.append(Refused(found.where, found.id, refusal.kind, str(refusal)))
            else:
                yield record

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # about pictures that it reads all the same
        shard = job.dataset.write_shard(index, accepted(), job.notes.folder)
    seen = shard.records + len(rejects)
    if piece.records not in (None, seen):
        raise UserError(f"{piece.file}: it has changed since the work was begun ({seen} records for {piece.records})")
    job.notes.write(index, shard, rejects)
    return job.notes.summary(index)


def _convert(job: Job, slices: Sequence[Slice], convert: Converter, max_rejects: float, progress: bool) -> Summary:
    """Convert what is not done; stop once too many records are refused."""
    summary, finished = Summary(0, {}), set(job.notes.finished())
    for index in finished:
        summary += job.notes.summary(index)
    tasks = [(index, piece) for index, piece in enumerate(slices) if index not in finished]
    known = [piece.records for piece in slices]
    total = None if None in known else sum(known)
    name = epath.Path(job.out).name
    with tqdm(total=total, initial=summary.total, desc=name, unit="record", disable=not progress) as bar:
        for part in convert(job, tasks):
            summary += part
            bar.set_postfix(rejected=summary.num_rejected, refresh=False)
            bar.update(part.total)
            # Of a known total the limit is then certain to be passed. Else it is a guess, but not one from little.
            if summary.num_rejected > max_rejects * (total or max(summary.total, _MIN_RECORDS_TO_JUDGE)):
                break
    return summary


def _plan(job: Job, files: Sequence[str], fingerprint: str) -> list[Slice]:
    """The slices, as planned now or when the work was begun."""
    notes = job.notes
    if (plan := notes.read_plan()) is not None:
        if plan[0] != fingerprint:
            raise UserError(
                f"{job.out} holds work begun with other settings or input files: remove it or choose another folder"
            )
        return plan[1]
    if not notes.stand_alone():
        raise UserError(f"{job.out} exists already: remove it or choose another folder")
    slices = FORMATS[job.recipe.format].plan(files, job.recipe.options)
    notes.write_plan(fingerprint, slices)
    return slices


def _finished(job: Job, fingerprint: str) -> Summary | None:
    """What came of this very work, if it is done."""
    if not (epath.Path(job.out) / INFO_FILE).exists():
        return None
    metadata = store.read_metadata(job.out)
    if metadata.get("fingerprint") != fingerprint:
        return None
    job.notes.clear()  # of a run that was killed while it cleared away
    return Summary(metadata["accepted"], metadata["rejected"])


def _fingerprint(recipe: Recipe, files: Sequence[str]) -> str:
    """Tells works apart: by what is to be done, and by which state of which files."""
    states = []
    for file in [*files, *FORMATS[recipe.format].files_behind(files)]:
        found = status(file)
        states.append((file, found.size, found.changed))
    return hashlib.sha256(json.dumps([_plain(recipe), states]).encode()).hexdigest()[:16]


def _plain(recipe: Recipe) -> Mapping[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _check(recipe: Recipe, max_rejects: float) -> None:
    if recipe.format not in FORMATS:
        raise UserError(f"no format {recipe.format!r}: one of {', '.join(FORMATS)}")
    if not 0 <= max_rejects <= 1:
        raise UserError(f"max_rejects is a share, from 0 to 1, not {max_rejects}")
    if recipe.options.records_per_shard < 1:
        raise UserError(f"records_per_shard must be positive, not {recipe.options.records_per_shard}")
    if not recipe.split.isidentifier() or recipe.split == "all":
        raise UserError(f"the split cannot be called {recipe.split!r}: a word, but not 'all'")
    root = recipe.limits.image_root
    if root is not None and not epath.Path(root).is_dir():
        raise UserError(f"the image root {root} is not a folder")


def _input_files(recipe: Recipe) -> list[str]:
    suffixes = FORMATS[recipe.format].suffixes
    files = []
    for entry in recipe.inputs:
        found = find_files(entry, suffixes)
        if not found:
            raise UserError(f"input {entry}: no such file, and no {' or '.join(suffixes)} files there")
        files += found
    return files


def _write_rejects(job: Job) -> None:
    notes = job.notes
    with (
        atomic_file(epath.Path(job.out) / REJECTS_FILE, notes.folder) as partial,
        partial.open("w") as lines,
    ):
        lines.writelines(json.dumps(reject) + "\n" for reject in notes.rejects())


def _too_many_rejects(summary: Summary, max_rejects: float, job: Job) -> str:
    kinds = ", ".join(f"{number} {kind}" for kind, number in summary.rejected.items())
    return (
        f"{summary.num_rejected} of {summary.total} records so far were refused, more than the limit of "
        f"{max_rejects:.1%}: {kinds}. {epath.Path(job.out) / REJECTS_FILE} says which and why: put it right, or raise "
        "--max-rejects, and run the same command again."
    )
