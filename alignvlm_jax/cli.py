"""The `alignvlm` command: ask, train, eval, import, export and more; `_GROUPS` has all of them.

This module has the parts that all commands share. The arguments and the help of each command are in `commands/`.

Exit codes:

    0    success
    2    an error that the user can fix (one line on stderr; `--debug` shows the traceback)
    3    the result is complete and not what was hoped for: `export --verify` differs, `compile` does not fit
    4    another process of the run died (`parallel/watch.py`); `compile` fell back to slower attention
    75   try again: preempted by SIGTERM, with the run saved; or another run is writing to the same output
    130  interrupted
"""

import argparse
import contextlib
import gc
import glob
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Sequence

import alignvlm_jax
from alignvlm_jax.commands import (
    analyze,
    ask,
    compilation_cache,
    compile,
    demo,
    evaluate,
    export,
    import_model,
    inspect,
    prepare,
    reproduce,
    train,
)
from alignvlm_jax.commands.arguments import Commands, style
from alignvlm_jax.commands.huge_pages import restart_with_huge_pages
from alignvlm_jax.commands.program import run_program
from alignvlm_jax.jax_modes import ordinary_modes

DESCRIPTION = """\
AlignVLM in JAX: vision-language models for documents. Their connector turns each image
patch into a mixture of the language model's own word embeddings.

get started:
  alignvlm ask --checkpoint nano PAGE.png --question "What is the total?"
  alignvlm demo    # train a small model on generated documents, on a CPU
"""

EPILOG = """\
`alignvlm COMMAND --help` shows the options and examples of a command.
"""

_GROUPS = {
    "use a model": (ask, inspect),
    "train a model": (demo, prepare, train, compile),
    "measure a model": (evaluate, analyze, reproduce),
    "convert a model": (import_model, export),
}

_ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd")
"""Device files of TPUs and GPUs on Linux."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    # With arguments, another program calls this function, and its process is left as it is.
    is_alone = argv is None and getattr(args, "process_id", None) is None and not getattr(args, "coordinator", None)
    if is_alone and args.command == "ask":
        # An answer of a small model takes less time than a restart, or than a search of JAX's objects for garbage.
        gc.disable()
    elif is_alone and not _has_accelerator():
        restart_with_huge_pages()
    _quiet_logs(args.debug)
    code = run_program("alignvlm", lambda: _run(args, use_cache=is_alone), debug=args.debug)
    if is_alone and code:
        _exit_without_threads(code)
    return code


def _exit_without_threads(code: int) -> None:
    """Ends the process if threads remain that Python would wait for."""
    # After a save that failed, Orbax's threads wait for 10 minutes for signals that never come.
    if any(not thread.daemon and thread is not threading.main_thread() for thread in threading.enumerate()):
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run(args: argparse.Namespace, *, use_cache: bool) -> int | None:
    """Runs a parsed command and returns its exit code, if it has one of its own."""
    # `compile` shows what the compiler does.
    if use_cache and args.command != "compile":
        args.cache = compilation_cache.turn_on(os.environ)
    with ordinary_modes():
        return args.run(args)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line.

    `overrides` of the result has the --config.key=value pairs as "key=value". `passed_on` has the arguments that the
    command passes on to another program.
    """
    parser, commands = _parsers()
    # argparse does not know the --config.key options. They are taken from the arguments that it does not recognize.
    args, rest = parser.parse_known_args(argv)
    args.debug = getattr(args, "debug", False)
    command = commands[args.command]
    args.passed_on = rest if args.passes_on_with and getattr(args, args.passes_on_with) is not None else []
    args.overrides, unknown = _split_overrides([] if args.passed_on else rest)
    if unknown:
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.overrides and not args.takes_overrides:
        command.error(f"`alignvlm {args.command}` does not accept --config.{args.overrides[0]}")
    return args


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Returns the parser of the command line, and the parsers of the commands by name."""
    parser = argparse.ArgumentParser(prog="alignvlm", description=DESCRIPTION, epilog=EPILOG, **style())
    version = f"alignvlm_jax {alignvlm_jax.__version__}"
    parser.add_argument("--version", action="version", version=version, help="show the version and exit")
    commands = Commands(parser, title="commands", dest="command", metavar="COMMAND")
    for group, members in _GROUPS.items():
        commands.start_group(group)
        for command in members:
            command.add(commands)
    return parser, commands.parsers


def _split_overrides(rest: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits arguments that argparse does not know into config overrides ("key=value") and unknown arguments.

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
        # The value may also be the next argument.
        if "=" not in key and rest and not rest[0].startswith("--"):
            key = f"{key}={rest.pop(0)}"
        (overrides if "=" in key else unknown).append(key if "=" in key else word)
    return overrides, unknown


def _has_accelerator() -> bool:
    return any(map(glob.glob, _ACCELERATORS))


def _quiet_logs(debug: bool) -> None:
    """Keeps log messages of libraries off the terminal, which shows tables and progress bars."""
    if debug:
        logging.basicConfig(level=logging.INFO)
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if importlib.util.find_spec("libtpu") and not _has_accelerator():
        # libtpu may be installed on a machine without a TPU, to compile for one. JAX would then search for TPUs, and
        # libtpu would warn that there are none.
        # A variable that is set but empty also leaves the choice to JAX.
        os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"
    for name in ("absl", "jax", "orbax", "grain", "etils", "tensorflow_datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # These log every error that they raise, with its traceback. asyncio logs those of each array that Orbax writes.
    for name in ("gcsfs", "fsspec", "s3fs", "aiobotocore", "botocore", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("absl").addFilter(lambda record: not _is_from_orbax(record))


def _is_from_orbax(record: logging.LogRecord) -> bool:
    """Returns whether Orbax logged this. It also raises every error that it logs."""
    # Most of its messages start like this. Others have the traceback of an error that it has caught.
    traceback = record.exc_info and record.exc_info[2]
    caught_by = traceback.tb_frame.f_globals.get("__name__", "") if traceback else ""
    return str(record.msg).startswith("[process=") or caught_by.startswith("orbax.")
