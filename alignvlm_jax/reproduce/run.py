"""`alignvlm reproduce`: draws the data, does the jobs that are left, writes the report."""

from collections.abc import Sequence
from pathlib import Path

from alignvlm_jax.config.loading import load_config
from alignvlm_jax.data import store
from alignvlm_jax.data.synthetic.corpus import build_corpus
from alignvlm_jax.errors import UserError
from alignvlm_jax.reproduce import parts, recipe, scheduler
from alignvlm_jax.reproduce.options import Options
from alignvlm_jax.reproduce.parts import names, restoration
from alignvlm_jax.reproduce.report import write_report

_CORPUS_SEED = 0
# Results and reports are small and kept; these are not.
_IGNORED = "data/\ncache/\nworkdir/\nlog.txt\n.lock\n"


def reproduce(
    options: Options, out: Path, *, at_once: int = 1, only: Sequence[str] = (), report_only: bool = False
) -> None:
    """Does what is left to do, or only writes the report on what is done.

    Args:
      options: what to compare.
      out: where everything goes.
      at_once: jobs side by side.
      only: names of parts; what they need is done too.
      report_only: do no job.

    Raises:
      UserError: some jobs failed; the report on the others is written.
      distributed.Interrupted: a signal came; the report on what is done is written.
    """
    jobs = parts.all_jobs(options, only)
    if report_only:
        print(f"report: {write_report(options, out)}")
        return
    base = load_config(options.config, options.overrides)
    for encoder in options.encoders:
        recipe.vision_folder(options, encoder, base)  # said before anything is drawn
    out.mkdir(parents=True, exist_ok=True)
    options.save(out)
    (out / ".gitignore").write_text(_IGNORED, encoding="utf-8")
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
        problems = scheduler.do_all(options, out, jobs, at_once=at_once)
    finally:
        print(f"report: {write_report(options, out)}")
    if problems:
        raise UserError(f"{len(problems)} of {len(jobs)} jobs have no figures, the first: {problems[0]}")


def _link(here: Path, there: Path) -> None:
    """The documents drawn elsewhere, under the name they have here; nothing is ever written there."""
    store.open_dataset(there, "heldout")
    here.parent.mkdir(parents=True, exist_ok=True)
    if here.is_symlink():
        here.unlink()
    elif here.exists():
        raise UserError(f"{here} exists already: leave out --data, or choose another --out")
    here.symlink_to(there.absolute(), target_is_directory=True)
