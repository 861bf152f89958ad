"""`alignvlm prepare`: converts conversations about images to a data set."""

import argparse
import os
import sys

from alignvlm_jax.commands.arguments import Commands, positive
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import location, source_location
from alignvlm_jax.storage.errors import translate

DESCRIPTION = """\
Convert conversations about images to a training data set. OUT becomes a TFDS data set in
ArrayRecord files. OUT/rejects.jsonl lists the records that cannot be used, with the
reason. If the command is interrupted or killed, run it again to resume.
"""

EPILOG = """\
examples:
  alignvlm prepare --format llava --input llava_v1_5_mix665k.json --images playground/data --out data/llava
  alignvlm prepare --format messages --input hf://datasets/ORG/NAME --out data/messages
  alignvlm prepare --format webdataset --input 'gs://bucket/cc12m/*.tar' --out gs://bucket/data/cc12m \\
      --runner DataflowRunner --project ... --region ... --temp_location gs://bucket/tmp

With --runner, the conversion is an Apache Beam pipeline, and options that are not listed
here are passed to Beam. Its workers need this package, in a container or through
--setup_file.

docs/data.md lists the formats.
"""

# Written here again, because --help must not wait for the modules that define them. A test compares them.
FORMATS = ("llava", "docdownstream", "bigdocs", "messages", "webdataset")
DEFAULT_MAX_REJECTS = 0.01
DEFAULT_MAX_PIXELS = 80_000_000
DEFAULT_MAX_RECORD_BYTES = 64 * 2**20
DEFAULT_RECORDS_PER_SHARD = 2000


def add(commands: Commands) -> None:
    """Adds the command."""
    summary = "convert images and conversations to a data set"
    command = commands.add("prepare", run, summary, DESCRIPTION, EPILOG, passes_on_with="runner")
    command.add_argument("--format", required=True, choices=FORMATS, help="format of the input")
    command.add_argument(
        "--input",
        required=True,
        nargs="+",
        type=source_location,
        metavar="FILE",
        help="files, folders of files, or quoted patterns with *; hf://datasets/ORG/NAME[@REVISION][/PATH] on the Hub",
    )
    command.add_argument(
        "--images",
        type=source_location,
        metavar="DIR",
        help="folder that image paths start from (default: folder of the input file); also hf://datasets/...",
    )
    command.add_argument("--out", required=True, type=location, metavar="DIR", help="folder of the data set")
    command.add_argument("--split", default="train", metavar="NAME", help="name of the split (default: train)")
    command.add_argument("--source", metavar="NAME", help="name of the data set (default: as stated in the records)")
    command.add_argument(
        "--instruction", default="", metavar="TEXT", help="user's message with an image that has only a caption"
    )
    command.add_argument(
        "--max-rejects",
        type=float,
        default=DEFAULT_MAX_REJECTS,
        metavar="SHARE",
        help="stop if a larger fraction of the records is refused (default: %(default)s)",
    )
    command.add_argument(
        "--allow-partial",
        action="store_true",
        help="convert input with missing or repeated shards (-of-00002); the data set's metadata says so",
    )
    command.add_argument(
        "--max-pixels",
        type=int,
        default=DEFAULT_MAX_PIXELS,
        metavar="N",
        help="refuse larger images (default: %(default)s)",
    )
    command.add_argument(
        "--max-record-bytes",
        type=int,
        default=DEFAULT_MAX_RECORD_BYTES,
        metavar="N",
        help="refuse larger records (default: %(default)s)",
    )
    command.add_argument(
        "--follow-links", action="store_true", help="allow links in the image folder to point out of it"
    )
    command.add_argument(
        "--records-per-shard",
        type=int,
        default=DEFAULT_RECORDS_PER_SHARD,
        metavar="N",
        help="approximate number of records per shard (default: %(default)s)",
    )
    command.add_argument(
        "--processes",
        type=positive,
        default=os.cpu_count(),
        metavar="N",
        help="number of processes (default: one per CPU core)",
    )
    command.add_argument(
        "--runner",
        metavar="NAME",
        help="convert with Apache Beam: DirectRunner, DataflowRunner, FlinkRunner, ...",
    )


def run(args: argparse.Namespace) -> int:
    """Converts the records, prints how many were refused, and returns the exit code."""
    from alignvlm_jax.data import prepare
    from alignvlm_jax.data.formats.checks import Limits
    from alignvlm_jax.data.formats.conversation import FormatOptions
    from alignvlm_jax.data.prepare_beam import in_beam

    recipe = prepare.Recipe(
        args.format,
        tuple(args.input),
        args.split,
        FormatOptions(args.records_per_shard, args.source, args.instruction, args.max_record_bytes),
        Limits(args.images, args.follow_links, args.max_pixels, args.max_record_bytes),
    )
    try:
        if args.runner:
            convert = in_beam([f"--runner={args.runner}", *args.passed_on])
        else:
            convert = prepare.in_processes(args.processes)
        summary = prepare.prepare(
            recipe, args.out, max_rejects=args.max_rejects, allow_partial=args.allow_partial, convert=convert
        )
    except OSError as error:
        raise translate(error) or UserError(str(error)) from error
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    print(f"{args.out}: {summary.accepted} of {summary.total} records, {summary.num_rejected} refused")
    for kind, number in summary.rejected.items():
        print(f"  {number:>8}  {kind}")
    return 0
