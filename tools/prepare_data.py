#!/usr/bin/env python3
r"""Converts conversations about images to a training data set.

    tools/prepare_data.py --format llava --input llava_v1_5_mix665k.json --images playground/data --out data/llava

    tools/prepare_data.py --format webdataset --input 'gs://bucket/cc12m/*.tar' --out gs://bucket/data/cc12m \
        --runner DataflowRunner --project ... --region ... --temp_location gs://bucket/tmp

OUT becomes a TFDS data set in ArrayRecord files. OUT/rejects.jsonl lists the records that cannot be used, with the
reason. If the command is interrupted or killed, run it again to resume. With --runner, the conversion is an Apache Beam
pipeline, and arguments that are not listed here are passed to Beam. Its workers need this package, in a container or
through --setup_file.
"""

import argparse
import dataclasses
import os
import sys

from alignvlm_jax.commands.program import run_program
from alignvlm_jax.data import prepare
from alignvlm_jax.data.formats import FORMATS
from alignvlm_jax.data.formats.checks import Limits
from alignvlm_jax.data.formats.conversation import FormatOptions
from alignvlm_jax.data.prepare_beam import in_beam
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import location


def main() -> int:
    """Runs the conversion and returns the exit code."""
    return run_program("prepare_data", lambda: run(*parse()))


def run(args: argparse.Namespace, beam_arguments: list[str]) -> int:
    """Converts the records, prints how many were refused, and returns the exit code.

    Args:
      args: the arguments of this command.
      beam_arguments: arguments for Beam.

    Raises:
      UserError: if the input cannot be read, or the output cannot be written.
    """
    recipe = prepare.Recipe(
        args.format,
        tuple(args.input),
        args.split,
        FormatOptions(args.records_per_shard, args.source, args.instruction, args.max_record_bytes),
        Limits(args.images, args.follow_links, args.max_pixels, args.max_record_bytes),
    )
    try:
        if args.runner:
            convert = in_beam([f"--runner={args.runner}", *beam_arguments])
        else:
            convert = prepare.in_processes(args.processes)
        summary = prepare.prepare(
            recipe, args.out, max_rejects=args.max_rejects, allow_partial=args.allow_partial, convert=convert
        )
    except OSError as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    print(f"{args.out}: {summary.accepted} of {summary.total} records, {summary.num_rejected} refused")
    for kind, number in summary.rejected.items():
        print(f"  {number:>8}  {kind}")
    return 0


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Returns the arguments of this command, and the remaining ones for Beam."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    options = {field.name: field.default for field in dataclasses.fields(FormatOptions)}
    limits = {field.name: field.default for field in dataclasses.fields(Limits)}
    parser.add_argument("--format", required=True, choices=FORMATS, help="format of the input")
    parser.add_argument(
        "--input", required=True, nargs="+", type=location, help="files, folders of files, or quoted patterns with *"
    )
    parser.add_argument(
        "--images", type=location, help="folder that image paths start from (default: folder of the input file)"
    )
    parser.add_argument("--out", required=True, type=location, help="folder of the data set")
    parser.add_argument("--split", default="train", help="name of the split (default: %(default)s)")
    parser.add_argument("--source", help="name of the data set (default: as stated in the records)")
    parser.add_argument("--instruction", default="", help="user's message with an image that has only a caption")
    parser.add_argument(
        "--max-rejects",
        type=float,
        default=prepare.DEFAULT_MAX_REJECTS,
        help="stop if a larger fraction of the records is refused (default: %(default)s)",
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="convert input of which shards (-of-00002) are missing or there twice; the data set's metadata say so",
    )
    parser.add_argument(
        "--max-pixels", type=int, default=limits["max_pixels"], help="refuse larger images (default: %(default)s)"
    )
    parser.add_argument(
        "--max-record-bytes",
        type=int,
        default=limits["max_record_bytes"],
        help="refuse larger records (default: %(default)s)",
    )
    parser.add_argument(
        "--follow-links", action="store_true", help="allow links in the image folder to point out of it"
    )
    parser.add_argument(
        "--records-per-shard",
        type=int,
        default=options["records_per_shard"],
        help="approximate number of records per shard (default: %(default)s)",
    )
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="number of processes (default: one per CPU core)"
    )
    parser.add_argument("--runner", help="convert with Apache Beam: DirectRunner, DataflowRunner, FlinkRunner, ...")
    args, rest = parser.parse_known_args()
    if rest and not args.runner:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args, rest


if __name__ == "__main__":
    sys.exit(main())
