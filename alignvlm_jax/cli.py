"""The `alignvlm` command: train, eval, ask, inspect, analyze, demo, reproduce.

Here is what all have in common; each has its arguments and its help in a file of `commands/`.

Exit codes: 0 done, 2 the user can fix it (one line on stderr; `--debug` shows the traceback), 4 another process of the
run died (`parallel/watch.py`), 75 preempted (SIGTERM; the run was saved), 130 interrupted.
"""

import argparse
import glob
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Sequence

import alignvlm_jax
from alignvlm_jax.commands import analyze, ask, demo, evaluate, inspect, reproduce, train
from alignvlm_jax.commands.arguments import Commands, style
from alignvlm_jax.commands.terminal import lasting_output
from alignvlm_jax.errors import UserError

DESCRIPTION = """\
AlignVLM in JAX: a vision-language model for documents whose connector says what it
sees in the language model's own words.

start here:
  alignvlm demo                       draw documents, train a nano model on them, score it
  alignvlm ask --checkpoint runs/demo/checkpoint PAGE.png --question "What is the total?"
"""

_COMMANDS = (train, evaluate, ask, inspect, analyze, demo, reproduce)

_ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd")
"""Where Linux shows TPUs and GPUs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    _quiet_logs(args.debug)
    with lasting_output():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        args.run(args)
        return 0
    except UserError as error:
        if args.debug:
            traceback.print_exc()
        line = " ".join(str(error).split())
        print(f"alignvlm: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if args.debug:
            traceback.print_exc()
        print("alignvlm: interrupted", file=sys.stderr)
        return getattr(error, "exit_code", 130)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; `overrides` collects the --config.key=value pairs as "key=value"."""
    parser, commands = _parsers()
    args, rest = parser.parse_known_args(argv)
    args.debug = getattr(args, "debug", False)
    command = commands[args.command]
    args.overrides, unknown = _split_overrides(rest)
    if unknown:
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.overrides and not args.takes_overrides:
        command.error(f"`alignvlm {args.command}` takes no --config.{args.overrides[0]}")
    return args


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(prog="alignvlm", description=DESCRIPTION, **style())
    parser.add_argument("--version", action="version", version=f"alignvlm_jax {alignvlm_jax.__version__}")
    commands = Commands(parser, title="commands", dest="command", metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser, commands.parsers


def _split_overrides(rest: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits what argparse did not know into config overrides ("key=value") and the truly unknown.

    before: ["--config.seed=1", "--config.mesh.data", "2", "--bogus"]
    after:  ["seed=1", "mesh.data=2"], ["--bogus"]
    """
    overrides, unknown, rest = [], [], list(rest)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--config."):
            unknown.append(word)
            continue
        key = word.removeprefix("--config.")
        if "=" not in key and rest and not rest[0].startswith("--"):
            key = f"{key}={rest.pop(0)}"
        (overrides if "=" in key else unknown).append(key if "=" in key else word)
    return overrides, unknown


def _quiet_logs(debug: bool) -> None:
    """Keeps the libraries' notes off the terminal, where the tables and progress bars are."""
    if debug:
        logging.basicConfig(level=logging.INFO)
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if importlib.util.find_spec("libtpu") and not any(map(glob.glob, _ACCELERATORS)):
        # libtpu can be there without a TPU, to compile for one. Where JAX looks for TPUs, it complains of having none.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name in ("absl", "jax", "orbax", "grain", "etils", "tensorflow_datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
