"""What the commands share: how one is added, arguments that several have, and how their values are read.

A function that reads a value raises `argparse.ArgumentTypeError` with what was expected.
"""

import argparse
import contextlib
import math
from collections.abc import Callable
from typing import Any


def style() -> dict[str, Any]:
    """What all parsers are made with: help as it is written, nothing abbreviated, and --debug."""
    # --debug is accepted before and after the command; SUPPRESS keeps the second from resetting the first.
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the traceback behind an error, and the log lines of the libraries",
    )
    return {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, "parents": [debug]}


class Commands:
    """The commands under a parser, of which one must be given.

    Attributes:
      parsers: of those added, by name.
    """

    def __init__(self, parser: argparse.ArgumentParser, *, title: str, dest: str, metavar: str):
        self._subparsers = parser.add_subparsers(title=title, dest=dest, required=True, metavar=metavar)
        self.parsers: dict[str, argparse.ArgumentParser] = self._subparsers.choices

    def add(
        self,
        name: str,
        run: Callable[[argparse.Namespace], None] | None,
        summary: str,
        description: str,
        epilog: str,
        *,
        takes_overrides: bool = False,
        distributed: bool = False,
    ) -> argparse.ArgumentParser:
        """Adds a command; its own arguments are to be added to what comes back.

        Args:
          name: of the command.
          run: does it; None if it has commands of its own.
          summary: its line in the list of commands.
          description: what its help says before the arguments.
          epilog: what its help says after them, examples first.
          takes_overrides: whether it takes --config.key=value.
          distributed: whether it can be run by several processes as one (`joined`).
        """
        command = self._subparsers.add_parser(name, help=summary, description=description, epilog=epilog, **style())
        if distributed:
            _add_distributed_arguments(command)
        command.set_defaults(run=run, takes_overrides=takes_overrides)
        return command


def add_views(command: argparse.ArgumentParser) -> None:
    """Adds --views."""
    command.add_argument(
        "--views",
        type=positive,
        default=1,
        metavar="K",
        help="look at each image K times, moved by parts of a patch: reads better, takes K times the work (default: 1)",
    )


def positive(text: str) -> int:
    """A whole number above 0."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return value


def names(text: str) -> tuple[str, ...]:
    """ "a,b" as its names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def pair(text: str) -> tuple[str, str]:
    """ "NAME=VALUE" as its two sides."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def at_least_0(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, got {text!r}")
    return int(text)


def numbers(text: str) -> list[float]:
    """ "0,0.5,1" as its numbers, each 0 or more."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(math.isfinite(value) and value >= 0 for value in values):
        raise argparse.ArgumentTypeError(f"expected numbers with commas between, 0 or more, got {text!r}")
    return values


def sizes(text: str) -> list[int]:
    """ "1000,3400" as its whole numbers above 0; "none" as no number."""
    return [] if text == "none" else [positive(part) for part in text.split(",")]


def joined(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    """The run as one of the processes that take part in it; what it does alone is not changed."""
    from alignvlm_jax.parallel import distributed

    return distributed.initialized(args.coordinator, args.num_processes, args.process_id)


def _add_distributed_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "several processes",
        "One runs on each host, all with the same command. TPU pods, GKE and Slurm are recognised and need none of "
        "these; elsewhere each host is told who takes part.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="process 0, and a port that is free there")
    group.add_argument("--num-processes", type=positive, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=at_least_0, metavar="I", help="which of them this is, from 0")
