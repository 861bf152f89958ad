"""Shared parts of the commands: how a command is added, common arguments, and the types of argument values.

A type function raises `argparse.ArgumentTypeError` with the expected form.
"""

import argparse
import contextlib
import math
import re
from collections.abc import Callable
from typing import Any

from alignvlm_jax.locations import LocationError, is_bucket, local_path, location, parse_location


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions, and lists commands by group, with their summaries on the same line."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            # argparse forgets that commands are indented by one more level than options.
            self._action_max_length += self._indent_increment

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        if not isinstance(action, argparse._SubParsersAction):
            return text
        # The first line repeats the metavar, which the usage line already has.
        text = text.partition("\n")[2]
        for command, group in getattr(action, "group_starts", {}).items():
            text = re.sub(rf"^    {command} ", f"  {group}:\n\\g<0>", text, count=1, flags=re.MULTILINE)
        return text


def style() -> dict[str, Any]:
    """Returns the keyword arguments of all parsers: the format of help, no abbreviations, and the option --debug."""
    # --debug is accepted before and after the command. SUPPRESS keeps the command's parser, whose default would be
    # False, from resetting an option before the command.
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show tracebacks of errors and log messages of libraries",
    )
    return {"formatter_class": _HelpFormatter, "allow_abbrev": False, "parents": [debug]}


class Commands:
    """The commands of a parser, one of which is required.

    Attributes:
      parsers: parsers of the added commands, by name.
    """

    def __init__(self, parser: argparse.ArgumentParser, *, title: str, dest: str, metavar: str):
        self._subparsers = parser.add_subparsers(title=title, dest=dest, required=True, metavar=metavar)
        self.parsers: dict[str, argparse.ArgumentParser] = self._subparsers.choices
        # First command of each group -> heading of the group, for `_HelpFormatter`.
        self._subparsers.group_starts = {}
        self._group = None

    def start_group(self, heading: str) -> None:
        """Lists the commands that are added from now on under a heading."""
        self._group = heading

    def add(
        self,
        name: str,
        run: Callable[[argparse.Namespace], None] | None,
        summary: str,
        description: str,
        epilog: str,
        *,
        takes_overrides: bool = False,
        passes_on_with: str | None = None,
    ) -> argparse.ArgumentParser:
        """Adds a command.

        Args:
          name: name of the command.
          run: function that executes the command; None if it has subcommands.
          summary: one line for the list of commands.
          description: help text before the arguments.
          epilog: help text after the arguments, which starts with examples.
          takes_overrides: whether the command accepts --config.key=value.
          passes_on_with: option with which the command passes on arguments that it does not know; without the option,
            or without a name here, they are an error.

        Returns:
          The parser of the command, for its own arguments.
        """
        command = self._subparsers.add_parser(name, help=summary, description=description, epilog=epilog, **style())
        command.set_defaults(run=run, takes_overrides=takes_overrides, passes_on_with=passes_on_with)
        if self._group is not None:
            self._subparsers.group_starts[name] = self._group
            self._group = None
        return command


def add_views(command: argparse.ArgumentParser) -> None:
    """Adds --views."""
    command.add_argument(
        "--views",
        type=positive,
        default=1,
        metavar="K",
        help="read K views of each image, shifted by parts of a patch; more accurate, at K times the work (default: 1)",
    )


def add_distributed(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of `distributed_run`."""
    group = command.add_argument_group(
        "distributed runs",
        "Run the same command on each host. The options below are not needed on TPU pods,\n"
        "GKE and Slurm, which are detected; elsewhere they identify the processes.\n"
        "--num-processes 1 alone makes each process a run of its own.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="host of process 0, and a free port there")
    group.add_argument("--num-processes", type=positive, metavar="N", help="number of processes")
    group.add_argument("--process-id", type=non_negative, metavar="I", help="index of this process, from 0")


def distributed_run(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    """Returns a context in which this process takes part in a distributed run, or alone without other processes."""
    from alignvlm_jax.parallel import distributed

    return distributed.initialized(args.coordinator, args.num_processes, args.process_id)


def positive(text: str) -> int:
    """Parses a positive integer."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def non_negative(text: str) -> int:
    """Parses an integer that is not negative."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected an integer of 0 or more, got {text!r}")
    return int(text)


def name_list(text: str) -> tuple[str, ...]:
    """Parses names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def disk_folder(text: str) -> str:
    """Parses an output folder that must be on a disk, because its files are changed and linked."""
    if is_bucket(parse_location(text)):
        tool = "gcloud storage cp -r" if text.lower().startswith("gs:") else "aws s3 cp --recursive"
        raise LocationError(
            f"{text} is in a bucket. Name a folder on a disk, and copy it afterwards: {tool} DIR {text}"
        )
    return local_path(text)


def name_and_path(text: str) -> tuple[str, str]:
    """Parses NAME=PATH."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {text!r}")
    return name, location(path)


def number_list(text: str) -> list[float]:
    """Parses numbers of 0 or more, separated by commas."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(math.isfinite(value) and value >= 0 for value in values):
        raise argparse.ArgumentTypeError(f"expected numbers of 0 or more, separated by commas, got {text!r}")
    return values


def size_list(text: str) -> list[int]:
    """Parses positive integers separated by commas, or "none" for an empty list."""
    return [] if text == "none" else [positive(part) for part in text.split(",")]
