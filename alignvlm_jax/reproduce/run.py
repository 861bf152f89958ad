"""Entry point of `alignvlm reproduce`: draws the data, runs the remaining jobs, writes the report."""

from collections.abc import Sequence
from pathlib import Path

from alignvlm_jax.data import store
from alignvlm_jax.data.synthetic.corpus import build_corpus
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop.start import load_config
from alignvlm_jax.leases.one_writer import one_writer
from alignvlm_jax.reproduce import parts, recipe, scheduler
from alignvlm_jax.reproduce.jobs import Job
from alignvlm_jax.reproduce.options import Options
from alignvlm_jax.reproduce.parts import names, restoration
from alignvlm_jax.reproduce.report import write_report

_CORPUS_SEED = 0
# Results and reports are small and can be committed. These files and folders should not be.
_IGNORED = "data/\ncache/\nworkdir/\nlog.txt\n.writer.*\n"


def reproduce(
    options: Options, out: Path, *, at_once: int = 1, only: Sequence[str] = (), report_only: bool = False
) -> None:
    """Runs the remaining jobs and writes the report, or only writes the report on the existing results.

    Args:
      options: the comparison to run.
      out: output folder.
      at_once: number of jobs that run at the same time.
      only: names of parts to run; the jobs that they need run too.
      report_only: whether to write only the report, without running any job.

    Raises:
      InUseError: if another process works on `out`.
      UserError: if some jobs failed. The report on the others is written.
      distributed.Interrupted: on a signal. The report on the existing results is written.
    """
    # `jobs` is computed first, because it refuses unknown parts and connectors.
    jobs = parts.all_jobs(options, only)
    if report_only:
        print(f"report: {write_report(options, out)}")
        return
    # A missing vision folder is reported before any data is drawn.
    base = load_config(options.config, options.overrides)
    for encoder in options.encoders:
        recipe.vision_folder(options, encoder, base)
    with one_writer(out):
        _run_jobs(options, out, jobs, at_once)


def _run_jobs(options: Options, out: Path, jobs: Sequence[Job], at_once: int) -> None:
    """Draws the data, runs the remaining jobs and writes the report, while this process holds the lease of `out`."""
    options.save(out)
    (out / ".gitignore").write_text(_IGNORED, encoding="utf-8")

    # Draw the data sets that the jobs use, unless they exist.
    data = out / "data"
    if options.data is None:
        build_corpus(data / "documents", seed=_CORPUS_SEED, sizes=dict(options.sizes))
    else:
        _link(data / "documents", Path(options.data) / "documents")
    if any(job.part == restoration.PART.name for job in jobs):
        restoration.build(data, dict(options.sizes))
    if any(job.part == names.PART.name for job in jobs):
        names.build(data, options.seeds)
    try:
        problems = scheduler.run_all(options, out, jobs, at_once=at_once)
    finally:
        print(f"report: {write_report(options, out)}")
    if problems:
        raise UserError(f"{len(problems)} of {len(jobs)} jobs have no results. The first: {problems[0]}")


def _link(link: Path, target: Path) -> None:
    """Links the existing documents into the output folder; nothing is written to the target.

    Raises:
      UserError: if the target is not a data set, or the path of the link is taken by something else.
    """
    store.open_dataset(target, "heldout")
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise UserError(f"{link} exists already: omit --data, or choose another --out")
    link.symlink_to(target.absolute(), target_is_directory=True)
