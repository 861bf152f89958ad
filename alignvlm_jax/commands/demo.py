"""`alignvlm demo`."""

import argparse
import pathlib

from alignvlm_jax.commands.arguments import Commands

DESCRIPTION = """\
The whole path in one command, on a CPU, in about a quarter of an hour: draw a corpus of
synthetic documents, start from the shipped nano backbones (a vision encoder that sees,
a language model that speaks), align and train them in three stages, and score the
result on held-out documents beside its honest controls.

Writes OUT/results.json, OUT/example.png and OUT/checkpoint. The same command again
resumes: what is done is not done twice.
"""

EPILOG = """\
examples:
  alignvlm demo
  alignvlm demo --out runs/seed1 --config.seed=1
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    command = commands.add(
        "demo", run, "the whole path, on a CPU, in minutes", DESCRIPTION, EPILOG, takes_overrides=True
    )
    command.add_argument("--out", default="runs/demo", metavar="DIR", help="where everything goes (default: runs/demo)")
    command.add_argument("--config", default="configs/nano.py", metavar="FILE", help="default: configs/nano.py")


def run(args: argparse.Namespace) -> None:
    """Draws, trains and scores."""
    from alignvlm_jax import demo
    from alignvlm_jax.config.loading import load_config

    demo.run(load_config(args.config, args.overrides), pathlib.Path(args.out))
