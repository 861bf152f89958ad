"""Converts users' data to a data set: reads, checks and writes records in parallel, and resumes interrupted work.

    recipe = Recipe("llava", ("llava_v1_5_mix665k.json",), limits=Limits(image_root="playground/data"))
    prepare(recipe, "data/llava")          -> data/llava, which store.open_dataset reads

The input is divided into slices. Each slice becomes one shard (`shards.py`), with a note when it is finished
(`prepare_notes.py`). A run that is killed and restarted writes the same files as an uninterrupted one. A record of the
data set has the fields

    id, source      text
    images          a list of the bytes of image files, unchanged
    conversation    JSON text: messages in the format of `chat.ChatTokenizer`

The conversation is one JSON text and not a sequence of roles and texts for two reasons. TFDS without TensorFlow reads
it a quarter faster (114 against 149 microseconds for a record of eight messages and 60 kB, parsing included). And the
position of an image stays distinct from the word `<image>` typed by a user.

Every record of the input is either in the data set or a line of `OUT/rejects.jsonl` with its place and the reason.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from alignvlm_jax.data import hub_inputs, nearby, repeated_files, shard_names, split_files, store
from alignvlm_jax.data.contents import HEAD_BYTES, describe_other_content
from alignvlm_jax.data.formats import FORMATS
from alignvlm_jax.data.formats.checks import Limits, check
from alignvlm_jax.data.formats.conversation import FormatOptions, Refused, Slice
from alignvlm_jax.data.paths import atomic_file, find_files, is_local, open_binary, status
from alignvlm_jax.data.prepare_notes import Notes, Summary
from alignvlm_jax.data.refusal import Refusal
from alignvlm_jax.data.shards import INFO_FILE, ShardedDataset
from alignvlm_jax.data.workers import WorkerDied, run_tasks
from alignvlm_jax.downloads import hub_cache
from alignvlm_jax.downloads.hub_ids import SCHEME, parse_dataset
from alignvlm_jax.errors import UserError
from alignvlm_jax.leases.lease import Lease
from alignvlm_jax.leases.one_writer import one_writer
from alignvlm_jax.locations import location, source_location
from alignvlm_jax.progress import progress_bar

NAME = "conversations"
REJECTS_FILE = "rejects.jsonl"
DEFAULT_MAX_REJECTS = 0.01

# The share of refused records is checked only after this number of records; before that it is too noisy.
_MIN_RECORDS_TO_JUDGE = 1000

FEATURES = {
    "id": tfds.features.Text(),
    "source": tfds.features.Text(),
    "conversation": tfds.features.Text(),
    # tfds.features.Image would decode to pixels when read, and fails on TIFF files and palettes.
    "images": tfds.features.Sequence(tfds.features.Scalar(dtype=np.object_)),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Input and settings of a conversion. The data set depends only on these.

    Attributes:
      format: one of `formats.FORMATS`.
      inputs: files, folders of files, or patterns with `*`; on the Hub as `hf://datasets/ORGANIZATION/NAME`.
      split: name of the split to write.
      options: settings of the format.
      limits: settings of the checks; image paths are relative to `limits.image_root`.
    """

    format: str
    inputs: tuple[str, ...]
    split: str = "train"
    options: FormatOptions = FormatOptions()
    limits: Limits = Limits()


@dataclasses.dataclass(frozen=True)
class Job:
    """A recipe and the folder of its data set."""

    recipe: Recipe
    out: str

    @property
    def notes(self) -> Notes:
        """Notes about the progress of the job."""
        return Notes(epath.Path(self.out))

    @property
    def dataset(self) -> ShardedDataset:
        """The data set that the job writes."""
        return ShardedDataset(epath.Path(self.out), NAME, self.recipe.split, tfds.features.FeaturesDict(FEATURES))


Task = tuple[int, Slice]
Converter = Callable[[Job, Sequence[Task]], Iterable[Summary]]


def prepare(
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    max_rejects: float = DEFAULT_MAX_REJECTS,
    allow_partial: bool = False,
    progress: bool = True,
    convert: Converter | None = None,
) -> Summary:
    """Converts the input to a data set in the folder `out`, or resumes the conversion.

    Args:
      recipe: input and settings.
      out: folder of the data set; empty, or with the same conversion, finished or not.
      max_rejects: largest share of refused records; above it, the conversion stops.
      allow_partial: whether to convert input with shards that are missing or present twice. The metadata name them.
      progress: whether to show a progress bar.
      convert: converts slices and yields the summary of each when it is done; by default `in_processes()`.

    Raises:
      InUseError: if another process is writing the same data set.
      UserError: if the settings or the input are not valid, the folder holds something else, or too many records are
        refused.
    """
    recipe = _with_locations(recipe)
    _check(recipe, max_rejects)
    recipe = _fetch_from_hub(recipe, Job(recipe, location(out)))
    job = Job(recipe, location(out))
    files, remarks = _input_files(recipe, allow_partial)
    fingerprint = _fingerprint(recipe, files)
    # A finished data set may be on storage that can only be read. Then no lease is needed, and none is possible.
    if not job.notes.folder.exists() and (done := _finished_summary(job, fingerprint)) is not None:
        return done
    with one_writer(job.out) as lease:
        return _prepare(
            job,
            files,
            remarks=remarks,
            fingerprint=fingerprint,
            convert=convert or in_processes(),
            max_rejects=max_rejects,
            progress=progress,
            lease=lease,
        )


def _prepare(
    job: Job,
    files: Sequence[str],
    *,
    remarks: Sequence[str],
    fingerprint: str,
    convert: Converter,
    max_rejects: float,
    progress: bool,
    lease: Lease,
) -> Summary:
    """Converts the input, or resumes the conversion, while this process holds the lease of the folder."""
    recipe = job.recipe
    if (done := _finished_summary(job, fingerprint)) is not None:
        return done
    slices = _plan(job, files, fingerprint)
    summary = _convert(job, slices, convert, max_rejects, progress, lease)
    notes = job.notes
    # Write the rejects before checking the limit, so that the user can see what was refused.
    _write_rejects(job)
    if summary.num_rejected > max_rejects * summary.total:
        message = _too_many_rejects(summary, max_rejects, job)
        # The user may fix the data before the next run, so slices with refused records are converted again.
        notes.discard_rejected()
        raise UserError(message)
    if not summary.accepted:
        reject = next(job.notes.rejects(), None)
        reason = f". The first is refused, {reject['where']}: {reject['why']}" if reject else ", the files are empty"
        raise UserError(f"{', '.join(recipe.inputs)}: no usable records{reason}")
    lease.check()
    # Until this writes the metadata, the folder does not count as a data set.
    job.dataset.finish(
        [notes.shard(index) for index in range(len(slices))],
        notes.folder,
        description="Conversations about images, prepared by alignvlm_jax.",
        metadata={"fingerprint": fingerprint, "recipe": _to_json(recipe), "remarks": list(remarks)}
        | dataclasses.asdict(summary),
    )
    notes.clear()
    return summary


def in_processes(processes: int | None = None) -> Converter:
    """Returns a converter that uses processes on this machine, by default one per CPU core."""

    def convert(job: Job, tasks: Sequence[Task]) -> Iterator[Summary]:
        try:
            function = functools.partial(convert_slice, job)
            for _, summary in run_tasks(function, tasks, processes or os.cpu_count() or 1):
                yield summary
        except WorkerDied as error:
            files = ", ".join(sorted({piece.file for _, piece in error.tasks}))
            raise UserError(
                f"a process was killed, perhaps because memory ran out, while it converted one of {files}. Run the "
                "same command again to resume"
            ) from error

    return convert


def convert_slice(job: Job, task: Task) -> Summary:
    """Writes the shard of a slice and a note of its size and its refused records."""
    (index, piece), recipe = task, job.recipe
    root = recipe.limits.image_root or piece.image_root or str(epath.Path(piece.file).parent)
    rejects = []

    # A generator, so that only one record is in memory at a time; refused records are collected in `rejects`.
    def accepted_records() -> Iterator[dict[str, Any]]:
        for item in FORMATS[recipe.format].read(piece, recipe.options):
            if isinstance(item, Refused):
                rejects.append(item.shortened())
                continue
            try:
                record = check(item, root, recipe.limits)
            except Refusal as refusal:
                rejects.append(Refused(item.where, item.id, refusal.kind, str(refusal)).shortened())
            else:
                yield record

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # PIL also warns about images that it can read
        shard = job.dataset.write_shard(index, accepted_records(), job.notes.folder)
    seen = shard.records + len(rejects)
    # A file that changed after planning has its records in other slices.
    if piece.records not in (None, seen):
        raise UserError(
            f"{piece.file} has changed since the conversion was started: expected {piece.records} records, got {seen}"
        )
    job.notes.write(index, shard, rejects)
    return job.notes.summary(index)


def _convert(
    job: Job, slices: Sequence[Slice], convert: Converter, max_rejects: float, progress: bool, lease: Lease
) -> Summary:
    """Converts the slices that are not finished, and stops when too many records are refused."""
    summary, finished = Summary(0, {}), set(job.notes.finished())
    # Count what earlier runs have finished.
    for index in finished:
        summary += job.notes.summary(index)
    tasks = [(index, piece) for index, piece in enumerate(slices) if index not in finished]
    sizes = [piece.records for piece in slices]
    total = None if None in sizes else sum(sizes)
    name = epath.Path(job.out).name
    with progress_bar(desc=name, total=total, initial=summary.total, unit="record", show=progress) as bar:
        for slice_summary in convert(job, tasks):
            lease.raise_if_lost()
            summary += slice_summary
            bar.set_postfix(rejected=summary.num_rejected, refresh=False)
            bar.update(slice_summary.total)
            # If the total is known, the limit is certain to be exceeded. Otherwise this is an estimate, from at least
            # `_MIN_RECORDS_TO_JUDGE` records.
            if summary.num_rejected > max_rejects * (total or max(summary.total, _MIN_RECORDS_TO_JUDGE)):
                break
    return summary


def _plan(job: Job, files: Sequence[str], fingerprint: str) -> list[Slice]:
    """Returns the slices, as planned when the conversion was started."""
    notes = job.notes
    # Resume with the saved plan: the finished shards belong to its slices.
    if (plan := notes.read_plan()) is not None:
        if plan[0] != fingerprint:
            raise UserError(
                f"{job.out} holds a conversion started with other settings or input files: remove it or choose another "
                "folder"
            )
        return plan[1]
    if not notes.has_no_other_files():
        raise UserError(f"{job.out} exists already: remove it or choose another folder")
    slices = FORMATS[job.recipe.format].plan(files, job.recipe.options)
    notes.write_plan(fingerprint, slices)
    return slices


def _finished_summary(job: Job, fingerprint: str) -> Summary | None:
    """Returns the summary of this conversion if it is finished, otherwise None."""
    if not (epath.Path(job.out) / INFO_FILE).exists():
        return None
    metadata = store.read_metadata(job.out)
    if metadata.get("fingerprint") != fingerprint:
        return None
    if job.notes.folder.exists():
        job.notes.clear()  # an earlier run was killed before it removed them
    return Summary(metadata["accepted"], metadata["rejected"])


def _fingerprint(recipe: Recipe, files: Sequence[str]) -> str:
    """Returns a hash of the recipe and of the state (size and time) of all input files."""
    states = []
    for file in [*files, *FORMATS[recipe.format].referenced_files(files)]:
        file_status = status(file)
        # A file of a commit does not change, and its copy may be elsewhere in the next run.
        on_hub = hub_cache.hub_name(file)
        states.append((on_hub or file, file_status.size, None if on_hub else file_status.changed))
    return hashlib.sha256(json.dumps([_to_json(recipe), states]).encode()).hexdigest()[:16]


def _to_json(recipe: Recipe) -> Mapping[str, Any]:
    """Returns the recipe as JSON values. Copies in the cache of the Hub have the names of the originals."""
    values = json.loads(json.dumps(dataclasses.asdict(recipe)))
    values["inputs"] = [hub_cache.hub_name(place) or place for place in values["inputs"]]
    root = values["limits"]["image_root"]
    values["limits"]["image_root"] = root and (hub_cache.hub_name(root) or root)
    return values


def _with_locations(recipe: Recipe) -> Recipe:
    """Returns the recipe with `~` expanded in its locations. Those that cannot be used are refused."""
    root = recipe.limits.image_root
    limits = dataclasses.replace(recipe.limits, image_root=None if root is None else source_location(root))
    return dataclasses.replace(recipe, inputs=tuple(map(source_location, recipe.inputs)), limits=limits)


def _fetch_from_hub(recipe: Recipe, job: Job) -> Recipe:
    """Returns the recipe with inputs on the Hub replaced by their copies in its cache."""
    root = recipe.limits.image_root
    places = [place for place in (*recipe.inputs, root or "") if place.startswith(SCHEME)]
    if not places:
        return recipe
    commits = hub_cache.commits_of(_earlier_files(job))

    def commit(place: str) -> str | None:
        return commits.get(parse_dataset(place).name)

    endings = FORMATS[recipe.format].suffixes
    inputs = (
        hub_inputs.fetch_input(place, endings, recipe.split, with_images=root is None, commit=commit(place))
        if place in places
        else place
        for place in recipe.inputs
    )
    recipe = dataclasses.replace(recipe, inputs=tuple(inputs))
    if root in places:
        root = hub_inputs.fetch_images(root, commit=commit(root))
    return dataclasses.replace(recipe, limits=dataclasses.replace(recipe.limits, image_root=root))


def _earlier_files(job: Job) -> list[str]:
    """Returns inputs of the conversion that was started or finished in the folder."""
    if (epath.Path(job.out) / INFO_FILE).exists():
        earlier = store.read_metadata(job.out).get("recipe", {})
        return [*earlier.get("inputs", ()), (earlier.get("limits") or {}).get("image_root") or ""]
    plan = job.notes.read_plan()
    return [] if plan is None else sorted({piece.file for piece in plan[1]})


def _check(recipe: Recipe, max_rejects: float) -> None:
    """Raises a `UserError` if a setting is not valid."""
    if recipe.format not in FORMATS:
        raise UserError(f"unknown format {recipe.format!r}: expected one of {', '.join(FORMATS)}")
    if not 0 <= max_rejects <= 1:
        raise UserError(f"max_rejects: expected a share from 0 to 1, got {max_rejects}")
    if recipe.options.records_per_shard < 1:
        raise UserError(f"records_per_shard: expected at least 1, got {recipe.options.records_per_shard}")
    if not recipe.split.isidentifier() or recipe.split == "all":
        raise UserError(f"the split cannot be called {recipe.split!r}: expected an identifier other than 'all'")
    root = recipe.limits.image_root
    if root is not None and not root.startswith(SCHEME) and not epath.Path(root).is_dir():
        raise UserError(f"the image root {root} is not a folder{_what_it_is(root)}")


def _input_files(recipe: Recipe, allow_partial: bool) -> tuple[list[str], list[str]]:
    """Returns the files that the recipe's inputs name, and a sentence about each part of them that is missing."""
    suffixes = FORMATS[recipe.format].suffixes
    files, unread, unfinished = [], [], []
    for entry in recipe.inputs:
        matches = find_files(entry, suffixes)
        if epath.Path(entry).is_dir():
            matches = [file for file in matches if not split_files.describes_data(epath.Path(file).name)]
            matches, sentence = split_files.select(matches, entry, recipe.split)
            unread += [sentence] * bool(sentence)
            unfinished += repeated_files.unfinished(entry)
        for file in [entry, *matches]:
            if is_local(file) and os.path.islink(file) and not os.path.exists(file):
                target = os.readlink(file)
                raise UserError(
                    f"input {file} is a link to {target}, which does not exist: fetch it or remove the link"
                )
        if not matches:
            raise UserError(
                f"input {entry}: no such file, and no {' or '.join(suffixes)} files there{_found_there(entry)}"
            )
        files += matches
    files, repeated = repeated_files.distinct(files)
    selection = shard_names.select(files, exists=_shard_exists)
    missing = [*selection.missing, *repeated_files.copies(selection.files), *unfinished]
    if missing and not allow_partial:
        raise UserError(
            f"not exactly the published files. {'; '.join(missing)}. Complete them, or convert what is there "
            "with --allow-partial"
        )
    remarks = [*unread, *repeated, *missing, *shard_names.gaps(files)]
    for sentence in remarks:
        print(f"note: {sentence}", file=sys.stderr)
    return list(selection.files), remarks


def _shard_exists(file: str) -> bool:
    """Returns whether a shard exists, whose name may end in a hash."""
    path = epath.Path(file)
    beginning = re.match(r".*-of-\d+", path.name, re.DOTALL)[0]
    return any(True for _ in path.parent.glob(f"{glob.escape(beginning)}*"))


def _what_it_is(path: str) -> str:
    """Returns what a path is if it is not a folder, to be added to a message."""
    if not epath.Path(path).exists():
        return ": there is no such path"
    with open_binary(path) as file:
        content = describe_other_content(file.read(HEAD_BYTES))
    return f" but {content}" if content else " but a file"


def _found_there(entry: str) -> str:
    """Returns what an input without files for the format holds, to be added to a message."""
    path = epath.Path(entry)
    if not path.is_dir():
        parent = path.parent
        return f". {parent} holds {nearby.list_names(parent)}" if parent.is_dir() else f". There is no folder {parent}"
    endings = nearby.count_endings(path)
    fitting = [name for name, format in FORMATS.items() if any(suffix in endings for suffix in format.suffixes)]
    found = ", ".join(f"{count} {ending}" for ending, count in list(endings.items())[:6])
    advice = f"; perhaps --format {' or '.join(fitting)}" if fitting else ""
    if ".arrow" in endings:
        advice = "; store a data set of `save_to_disk` with `to_parquet` and give that"
    if ".zip" in endings:
        advice = "; unpack the zip archives first"
    return f". The folder holds {found}{advice}" if found else ". The folder is empty"


def _write_rejects(job: Job) -> None:
    """Writes all refused records, from the notes, to `rejects.jsonl`."""
    notes = job.notes
    with (
        atomic_file(epath.Path(job.out) / REJECTS_FILE, notes.folder) as partial,
        partial.open("w") as lines,
    ):
        lines.writelines(json.dumps(reject) + "\n" for reject in notes.rejects())


def _too_many_rejects(summary: Summary, max_rejects: float, job: Job) -> str:
    """Returns the message about too many refused records."""
    kinds = ", ".join(f"{number} {kind}" for kind, number in summary.rejected.items())
    first = next(job.notes.rejects())
    return (
        f"{summary.num_rejected} of {summary.total} records so far were refused, more than the limit of "
        f"{max_rejects:.1%}: {kinds}. The first is {first['where']}: {first['why']}. "
        f"{epath.Path(job.out) / REJECTS_FILE} lists them all. Fix the data, or raise --max-rejects, and run the same "
        "command again."
    )
