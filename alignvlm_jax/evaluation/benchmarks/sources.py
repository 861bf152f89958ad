"""The public source of each benchmark on the Hugging Face Hub, for `alignvlm eval --benchmark` without `--data`.

    fetch(["docvqa", "pope"], splits)   {"docvqa": Fetched(folder, "hf://datasets/lmms-lab/DocVQA@COMMIT"), ...}

Only the files of the split are downloaded, into the cache of the Hub. The newest commit is used, and recorded with the
scores. DocDownstream's images are one archive in several parts, which is unpacked next to its files.

The names of repositories and files are those in docs/benchmarks.md. They were collected from the publishers' pages and
from harnesses (lmms-eval, VLMEvalKit), and tested against small repositories with the same names.
"""

import dataclasses
import fnmatch
import pathlib
from collections.abc import Mapping

from alignvlm_jax.downloads import archives, hub
from alignvlm_jax.downloads.hub_ids import HubId
from alignvlm_jax.downloads.stubs import format_size
from alignvlm_jax.errors import UserError
from alignvlm_jax.evaluation.benchmarks import docdownstream, files
from alignvlm_jax.parallel import distributed
from alignvlm_jax.parallel.writing import call_in_primary

_VALIDATION_AND_TEST = {"val": "validation", "test": "test"}


@dataclasses.dataclass(frozen=True)
class Source:
    """The place where a benchmark is published.

    Attributes:
      repository: name of the data set on the Hub.
      splits: patterns of the files of each split, as in `fnmatch`; `*` also matches slashes.
      folder: folder in the repository that the reader is given.
      archive: pattern of the parts of an archive of images, and the folder that it unpacks to; None if there is none.
    """

    repository: str
    splits: Mapping[str, tuple[str, ...]]
    folder: str = ""
    archive: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Fetched:
    """The files of a benchmark in the cache.

    Attributes:
      folder: folder with the files.
      name: the data set with its commit.
    """

    folder: pathlib.Path
    name: str


def _parquet(repository: str, splits: Mapping[str, str], place: str = "data", folder: str = "") -> Source:
    """Returns the source of a benchmark in Parquet files, given the publisher's names of the splits."""
    patterns = {split: (f"{place}/{name}-*.parquet",) for split, name in splits.items()}
    return Source(repository, patterns, folder)


def _docdownstream(dataset: str, *splits: str) -> Source:
    return Source(
        "mPLUG/DocDownstream-1.0",
        {
            split: ("val.jsonl" if split == "val" else f"{split}/{dataset}_{split}.jsonl", f"meta/{dataset}/*")
            for split in splits
        },
        archive=("partial-imgs*", docdownstream.IMAGES_FOLDER),
    )


SOURCES: Mapping[str, Source] = {
    "docvqa": _parquet("lmms-lab/DocVQA", _VALIDATION_AND_TEST, "DocVQA", folder="DocVQA"),
    "infovqa": _parquet("lmms-lab/DocVQA", _VALIDATION_AND_TEST, "InfographicVQA", folder="InfographicVQA"),
    "deepform": _docdownstream("DeepForm", "test"),
    "klc": _docdownstream("KleisterCharity", "test"),
    "wtq": _docdownstream("WikiTableQuestions", "test", "val"),
    "tabfact": _docdownstream("TabFact", "test", "val"),
    "chartqa": _parquet("HuggingFaceM4/ChartQA", {"val": "val", "test": "test"}),
    "textvqa": _parquet("lmms-lab/textvqa", _VALIDATION_AND_TEST),
    "tablevqa": Source(
        "terryoo/TableVQA-Bench",
        {"test": tuple(f"data/{part}-*.parquet" for part in ("vwtq", "vwtq_syn", "vtabfact", "fintabnetqa"))},
    ),
    **{
        f"vcr_{language}_{difficulty}": _parquet(f"vcr-org/VCR-wiki-{language}-{difficulty}-test", {"test": "test"})
        for language in ("en", "zh")
        for difficulty in ("easy", "hard")
    },
    "mmmu": _parquet("MMMU/MMMU", {"val": "validation", "dev": "dev", "test": "test"}, "*"),
    "seed": _parquet("lmms-lab/SEED-Bench", {"test": "test"}),
    "mmvet": _parquet("lmms-lab/MMVet", {"test": "test"}),
    "pope": _parquet("lmms-lab/POPE", {"test": "test"}),
    "gqa": Source(
        "lmms-lab/GQA",
        {"test": ("testdev_balanced_instructions/testdev-*.parquet", "testdev_balanced_images/testdev-*.parquet")},
    ),
}
"""Source of each benchmark, by its name in the table of benchmarks."""


def fetch(splits: Mapping[str, str]) -> dict[str, Fetched]:
    """Downloads the files of benchmarks, after printing their sizes and licenses. All processes must call it.

    Args:
      splits: split by the name of the benchmark.

    Raises:
      UserError: if a split has no known source, or it may not be read; `TemporaryError` if the Hub cannot be reached.
    """
    for name, split in splits.items():
        if split not in SOURCES[name].splits:
            known = " and ".join(SOURCES[name].splits)
            raise UserError(
                f"{name}: the split {split} has no known source on the Hub ({known} has): download it "
                "where docs/benchmarks.md says, and give its folder with --data"
            )
    repositories = sorted({SOURCES[name].repository for name in splits})
    # All hosts use the commit that process 0 finds.
    commits = distributed.gather_json(call_in_primary(lambda: _find_commits(repositories)))[0]
    return {name: _fetch(SOURCES[name], split, commits[SOURCES[name].repository]) for name, split in splits.items()}


def _find_commits(repositories: list[str]) -> dict[str, str]:
    return {name: hub.list_files(HubId(name, kind="dataset")).commit for name in repositories}


def _fetch(source: Source, split: str, commit: str) -> Fetched:
    is_quiet = not distributed.is_primary()
    # In process 0 the list is known by the name of the branch, with which it also recorded the commit.
    hub_id = HubId(source.repository, None if distributed.is_primary() else commit, "dataset")
    listing = hub.list_files(hub_id)
    patterns = source.splits[split]
    names = [name for name in listing.sizes if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not names:
        raise UserError(
            f"{listing.title} has no files {' or '.join(patterns)} any more: download the benchmark where "
            "docs/benchmarks.md says, and give its folder with --data"
        )
    if any(name.endswith(".parquet") for name in names):
        files.check_parquet()
    parts = [] if source.archive is None else sorted(fnmatch.filter(listing.sizes, source.archive[0]))
    folder = hub.snapshot_of(listing)
    if parts and not (folder / source.archive[1]).is_dir():
        size = format_size(sum(listing.sizes[name] for name in parts))
        hub.say(
            f"{listing.title}: its images are one archive of {size}, which is unpacked next to it", is_quiet=is_quiet
        )
        hub.fetch(listing, [*names, *parts], is_quiet=is_quiet)
        archives.unpack_parts([folder / name for name in parts], folder / source.archive[1], is_quiet=is_quiet)
    folder = hub.fetch(listing, names, is_quiet=is_quiet)
    return Fetched(folder / source.folder, str(listing.pinned))
