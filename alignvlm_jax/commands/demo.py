"""`alignvlm demo`: creates data, trains a small model and scores it, in one command."""

import argparse
import pathlib

from alignvlm_jax.commands.arguments import Commands, disk_folder
from alignvlm_jax.locations import local_path

DESCRIPTION = """\
Run everything in one command, on a CPU, in about 15 minutes: generate a corpus of
synthetic documents, start from the pretrained nano backbones in the package, train
the model in three stages, and score it on held-out documents, with blank and wrong
images as controls.

The results are OUT/results.json, OUT/example.png and OUT/checkpoint. Run the same
command again to resume; finished steps are not repeated.
"""

EPILOG = """\
examples:
  alignvlm demo
  alignvlm demo --out runs/seed1 --config.seed=1
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    summary = "generate documents, train a small model and score it"
    command = commands.add("demo", run, summary, DESCRIPTION, EPILOG, takes_overrides=True)
    command.add_argument(
        "--out", type=disk_folder, default="runs/demo", metavar="DIR", help="output folder (default: runs/demo)"
    )
    command.add_argument(
        "--config",
        type=local_path,
        default="configs/nano.py",
        metavar="FILE",
        help="config file (default: configs/nano.py)",
    )


def run(args: argparse.Namespace) -> None:
    """Generates the documents, trains the model and scores it."""
    from alignvlm_jax import demo
    from alignvlm_jax.interop.start import load_config

    demo.run(load_config(args.config, args.overrides), pathlib.Path(args.out))
