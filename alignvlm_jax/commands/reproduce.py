"""`alignvlm reproduce`."""

import argparse
import pathlib

from alignvlm_jax.commands.arguments import Commands, names, pair, positive

DESCRIPTION = """\
The paper's comparison of connectors at a scale that a CPU trains in minutes a run: ALIGN, MLP, Perceiver, Ovis,
H-Reducer and HoneyBee's C-Abstractor from the same backbones, on the same pages in the same order, for the same number
of steps, with the same number of tuning trials. Writes OUT/report.md and plots.

Every run has its own folder, whose result.json stays when it is done and is never made again: stop it with Ctrl-C
whenever you like, and the same command goes on. The report is written from what is there.
"""

EPILOG = """\
examples:
  alignvlm reproduce --out runs/reproduce
  alignvlm reproduce --out runs/reproduce --jobs 2                   # two runs side by side, a core each
  alignvlm reproduce --out runs/reproduce --seeds 1 --only accuracy  # the main table, one seed
  alignvlm reproduce --out runs/reproduce --report-only

A run has a fixed number of steps, equal for all (configs/reproduce.py). --minutes is a limit: a run that takes longer
is stopped, named in the report and left out of its tables; a higher limit goes on with it. It is meant for a run that
has the machine to itself: of two side by side each gets twice as much.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    summary = "the paper's connectors compared under one recipe"
    command = commands.add("reproduce", run, summary, DESCRIPTION, EPILOG, takes_overrides=True)
    command.add_argument("--out", required=True, metavar="DIR", help="where everything goes; resumed if it exists")
    command.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs of each kind (default: 3)")
    command.add_argument(
        "--minutes", type=float, default=3.0, metavar="N", help="most minutes that a run may train (default: 3)"
    )
    command.add_argument("--jobs", type=positive, default=1, metavar="K", help="runs side by side (default: 1)")
    command.add_argument("--only", type=names, default=(), metavar="PART[,PART]", help="some parts only")
    command.add_argument(
        "--connectors", type=names, metavar="NAME[,NAME]", help="some connectors only (default: all six)"
    )
    command.add_argument(
        "--encoders",
        type=names,
        metavar="NAME[,NAME]",
        help="transcription (never saw labels per patch), patches (the shipped one), or both (default)",
    )
    command.add_argument(
        "--vision", type=pair, action="append", default=[], metavar="ENCODER=DIR", help="another folder for an encoder"
    )
    command.add_argument("--data", metavar="DIR", help="folder of data sets drawn before (default: OUT/data)")
    command.add_argument("--questions", type=positive, metavar="N", help="ask the first N only (default: all)")
    command.add_argument("--config", default="configs/reproduce.py", metavar="FILE", help="the recipe")
    command.add_argument("--report-only", action="store_true", help="write the report on what is there")


def run(args: argparse.Namespace) -> None:
    """Trains what is not trained yet, and writes the report."""
    from alignvlm_jax.reproduce.options import Options
    from alignvlm_jax.reproduce.run import reproduce

    chosen = {name: getattr(args, name) for name in ("connectors", "encoders") if getattr(args, name)}
    options = Options(
        seeds=args.seeds,
        minutes=args.minutes,
        config=args.config,
        overrides=tuple(args.overrides),
        data=args.data,
        vision=tuple(args.vision),
        questions=args.questions,
        **chosen,
    )
    reproduce(options, pathlib.Path(args.out), at_once=args.jobs, only=args.only, report_only=args.report_only)
