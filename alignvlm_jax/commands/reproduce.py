"""`alignvlm reproduce`: compares the paper's connectors at a small scale."""

import argparse
import pathlib

from alignvlm_jax.commands.arguments import Commands, disk_folder, name_and_path, name_list, positive
from alignvlm_jax.locations import local_path

DESCRIPTION = """\
Compare the paper's connectors at a scale at which a run takes minutes on a CPU: ALIGN,
MLP, Perceiver, Ovis, H-Reducer and HoneyBee's C-Abstractor. All start from the same
backbones, and train on the same pages in the same order, with the same number of steps
and of tuning trials. The results are OUT/report.md and plots.

Each run has a folder of its own, and its result.json marks it as done. Stop the command
at any time with Ctrl-C, and run it again to resume. The report covers the runs that are
done.
"""

EPILOG = """\
examples:
  alignvlm reproduce --out runs/reproduce
  alignvlm reproduce --out runs/reproduce --jobs 2                   # two runs in parallel, on one core each
  alignvlm reproduce --out runs/reproduce --seeds 1 --only accuracy  # the main table, one seed
  alignvlm reproduce --out runs/reproduce --report-only

All runs have the same fixed number of steps (configs/reproduce.py). A run that exceeds
--minutes is stopped; the report names it, and its tables omit it. With a higher limit it
resumes. The limit is for a run that has the machine to itself: of two runs in parallel,
each gets twice the time.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    summary = "compare the paper's connectors under one recipe"
    command = commands.add("reproduce", run, summary, DESCRIPTION, EPILOG, takes_overrides=True)
    command.add_argument(
        "--out", required=True, type=disk_folder, metavar="DIR", help="output folder; resumed if it exists"
    )
    command.add_argument(
        "--seeds", type=positive, default=3, metavar="N", help="number of seeds of each run (default: 3)"
    )
    command.add_argument(
        "--minutes",
        type=float,
        default=3.0,
        metavar="N",
        help="maximum training time of a run, in minutes (default: 3)",
    )
    command.add_argument("--jobs", type=positive, default=1, metavar="K", help="runs in parallel (default: 1)")
    command.add_argument(
        "--only", type=name_list, default=(), metavar="PART[,PART]", help="parts of the report (default: all)"
    )
    command.add_argument(
        "--connectors", type=name_list, metavar="NAME[,NAME]", help="connectors to compare (default: all six)"
    )
    command.add_argument(
        "--encoders",
        type=name_list,
        metavar="NAME[,NAME]",
        help="transcription (trained without labels per patch) or patches (the encoder in the package) (default: both)",
    )
    command.add_argument(
        "--vision",
        type=name_and_path,
        action="append",
        default=[],
        metavar="ENCODER=DIR",
        help="load an encoder from another folder; may be repeated",
    )
    command.add_argument(
        "--data", type=local_path, metavar="DIR", help="folder with existing data sets (default: OUT/data)"
    )
    command.add_argument(
        "--questions", type=positive, metavar="N", help="score only the first N questions (default: all)"
    )
    command.add_argument(
        "--config",
        type=local_path,
        default="configs/reproduce.py",
        metavar="FILE",
        help="recipe (default: configs/reproduce.py)",
    )
    command.add_argument("--report-only", action="store_true", help="write the report without any new runs")


def run(args: argparse.Namespace) -> None:
    """Performs the missing runs and writes the report."""
    from alignvlm_jax.reproduce.options import Options
    from alignvlm_jax.reproduce.run import reproduce

    selected = {name: getattr(args, name) for name in ("connectors", "encoders") if getattr(args, name)}
    options = Options(
        seeds=args.seeds,
        minutes=args.minutes,
        config=args.config,
        overrides=tuple(args.overrides),
        data=args.data,
        vision=tuple(args.vision),
        questions=args.questions,
        **selected,
    )
    reproduce(options, pathlib.Path(args.out), at_once=args.jobs, only=args.only, report_only=args.report_only)
