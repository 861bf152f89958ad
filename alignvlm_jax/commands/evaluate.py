"""`alignvlm eval`."""

import argparse

from alignvlm_jax.commands.arguments import Commands, add_views, joined, positive
from alignvlm_jax.errors import UserError

DESCRIPTION = """\
Score a checkpoint on documents it has not seen: every question is answered by free
greedy decoding and counts as right only if the answer matches exactly. The table has
a row for each family of documents, one for the font that training never saw, and 95 %
confidence intervals.

With --benchmark: on published benchmarks, by their official scores, beside the paper's.
Answers are kept as they come; the same command goes on where it was stopped.
"""

EPILOG = """\
examples:
  alignvlm eval --checkpoint runs/demo/checkpoint
  alignvlm eval --checkpoint runs/demo/checkpoint --control blank
  alignvlm eval --checkpoint runs/demo/checkpoint --split validation --json scores.json
  alignvlm eval --checkpoint runs/demo/checkpoint --mesh data=2,fsdp=4
  alignvlm eval --checkpoint runs/3b --benchmark docvqa,chartqa --data DocDownstream-1.0 --json scores.json

controls, which an honest reader fails:
  blank   a white page of the same size: what can be guessed from the question alone
  wrong   another document of the same family: what can be guessed from the family

Tune on --split validation only; heldout is for the final word.

docs/benchmarks.md says for each benchmark where it is published and how its files must lie.
"""


CONTROLS = ("none", "blank", "wrong")


def add(commands: Commands) -> None:
    """Adds the command."""
    summary = "score a checkpoint on held-out documents"
    command = commands.add("eval", run, summary, DESCRIPTION, EPILOG, distributed=True)
    command.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help='the workdir of a training run, an exported folder, or "nano"',
    )
    command.add_argument(
        "--data", metavar="DIR", help="folder of the data set (default: the run's own; an exported folder has none)"
    )
    command.add_argument(
        "--benchmark",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        metavar="NAME[,NAME]",
        help="score these published benchmarks, whose files are in --data (an unknown name lists them)",
    )
    command.add_argument("--split", help="which split to score (default: heldout, or the benchmark's own)")
    command.add_argument("--control", choices=CONTROLS, default="none", help="replace the images (default: none)")
    command.add_argument("--limit", type=positive, metavar="N", help="score the first N questions (of each benchmark)")
    command.add_argument("--batch-size", type=positive, default=32, metavar="N", help="questions decoded at once")
    add_views(command)
    command.add_argument("--json", metavar="FILE", help="write the figures here")
    command.add_argument(
        "--predictions", metavar="FILE", help="write one JSON line per question here; of benchmarks, gone on with"
    )

    command.add_argument(
        "--mesh",
        metavar="data=2,fsdp=2,tensor=2",
        help="spread weights and questions over all devices so (default: one device; with several processes, fsdp)",
    )


def run(args: argparse.Namespace) -> None:
    """Scores the checkpoint on its own documents or on benchmarks."""
    from alignvlm_jax.evaluation import runner
    from alignvlm_jax.evaluation.benchmarks.runner import evaluate_benchmarks
    from alignvlm_jax.evaluation.benchmarks.table import find_benchmarks
    from alignvlm_jax.parallel.mesh import parse_mesh

    mesh = parse_mesh(args.mesh) if args.mesh else None
    if args.benchmark is not None:
        find_benchmarks(args.benchmark)
        if not args.data:
            raise UserError("--benchmark needs --data: the folder that the benchmark's files are in")
        if args.control != "none":
            raise UserError("--control is for the run's own documents, not for benchmarks")
        with joined(args):
            evaluate_benchmarks(
                args.checkpoint,
                args.benchmark,
                data=args.data,
                split=args.split,
                limit=args.limit,
                batch_size=args.batch_size,
                views=args.views,
                json_file=args.json,
                predictions_file=args.predictions,
                mesh=mesh,
            )
        return
    with joined(args):
        runner.evaluate_checkpoint(
            args.checkpoint,
            data=args.data,
            split=args.split or "heldout",
            control=args.control,
            limit=args.limit,
            batch_size=args.batch_size,
            views=args.views,
            json_file=args.json,
            predictions_file=args.predictions,
            mesh=mesh,
        )
