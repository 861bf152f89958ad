"""`alignvlm eval`: scores a checkpoint on held-out documents or published benchmarks."""

import argparse

from alignvlm_jax.commands.arguments import Commands, add_distributed, add_views, distributed_run, name_list, positive
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import location, source_location

DESCRIPTION = """\
Score a checkpoint on a data set: the demo's held-out documents, or one of your own from
`alignvlm prepare`. Answers are decoded greedily. The table has a column for each metric,
and rows for each family or source of documents and for the font that is not in the
training data, with 95 % confidence intervals.

With --benchmark, score it on published benchmarks with their official metrics, next to
the paper's scores. Answers are stored as they arrive; run the same command again to
resume.
"""

EPILOG = """\
examples:
  alignvlm eval --checkpoint runs/demo/checkpoint
  alignvlm eval --checkpoint runs/demo/checkpoint --control blank
  alignvlm eval --checkpoint runs/demo/checkpoint --split validation --json scores.json
  alignvlm eval --checkpoint runs/demo/checkpoint --mesh data=2,fsdp=4
  alignvlm eval --checkpoint runs/tags --data data/tags_test --split test --metric exact,anls --show-wrong 10
  alignvlm eval --checkpoint runs/3b --benchmark docvqa,chartqa --json scores.json
  alignvlm eval --checkpoint runs/3b --benchmark docvqa,chartqa --data DocDownstream-1.0

metrics (spaces at the ends of an answer do not count)
  exact    the same text
  anls     ANLS, as of DocVQA: near misses count in part
  relaxed  relaxed accuracy, as of ChartQA: numbers within 5 %
  f1       F1 over the values of all documents, as of DeepForm: the question is the key, case
           does not count, and "None" means that the document has no such value

controls (a model that reads the page fails them):
  blank   a white page of the same size; shows what can be guessed from the question
  wrong   another document of the same family; shows what can be guessed from the family

Use --split validation for tuning, and heldout only for the final score.

docs/benchmarks.md lists where each benchmark is published and how to arrange its files.
"""

CONTROLS = ("none", "blank", "wrong")


def add(commands: Commands) -> None:
    """Adds the command."""
    summary = "score a checkpoint on held-out documents"
    command = commands.add("eval", run, summary, DESCRIPTION, EPILOG)
    command.add_argument(
        "--checkpoint",
        required=True,
        type=source_location,
        metavar="DIR",
        help='folder of a training run, exported folder or its name on the Hub, or "nano" for the model in the package',
    )
    command.add_argument(
        "--data",
        type=location,
        metavar="DIR",
        help="folder of the data set (default: the data set of the run; required for exported folders)",
    )
    command.add_argument(
        "--benchmark",
        type=name_list,
        metavar="NAME[,NAME]",
        help="score these published benchmarks (an unknown name prints the list); without --data, their files are "
        "downloaded from the Hugging Face Hub",
    )
    command.add_argument(
        "--split", metavar="NAME", help="split to score (default: heldout, or the benchmark's default split)"
    )
    command.add_argument(
        "--metric",
        type=name_list,
        metavar="NAME[,NAME]",
        help="metrics of a data set, see below (default: exact)",
    )
    command.add_argument(
        "--show-wrong",
        type=positive,
        metavar="N",
        help="print the first N answers that are wrong by the first metric, and save their images",
    )
    command.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="maximum length of an answer in tokens (default: 32, or the benchmark's own)",
    )
    command.add_argument(
        "--control", choices=CONTROLS, default="none", help="replace the images, see below (default: none)"
    )
    command.add_argument(
        "--limit", type=positive, metavar="N", help="score only the first N questions (of each benchmark)"
    )
    command.add_argument(
        "--allow-partial",
        action="store_true",
        help="with --benchmark, score a benchmark with a missing part; its score is marked",
    )
    command.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="questions decoded at once (default: 32)"
    )
    add_views(command)
    command.add_argument("--json", type=location, metavar="FILE", help="write the scores to this file")
    command.add_argument(
        "--predictions",
        type=location,
        metavar="FILE",
        help="write the answers to this file, one JSON line per question; benchmarks resume from it",
    )
    command.add_argument(
        "--mesh",
        metavar="data=2,fsdp=2,tensor=2",
        help="distribute weights and questions over all devices (default: one device; fsdp with several processes)",
    )
    add_distributed(command)


def run(args: argparse.Namespace) -> None:
    """Scores the checkpoint on documents or on benchmarks."""
    from alignvlm_jax.evaluation import runner
    from alignvlm_jax.evaluation.benchmarks.runner import evaluate_benchmarks
    from alignvlm_jax.evaluation.benchmarks.table import find_benchmarks
    from alignvlm_jax.parallel.mesh import parse_mesh

    if args.benchmark is not None:
        find_benchmarks(args.benchmark)
        if args.control != "none":
            raise UserError("--control cannot be used with --benchmark; it is for documents only")
        for option in ("metric", "show_wrong", "max_new_tokens"):
            if getattr(args, option):
                raise UserError(f"--{option.replace('_', '-')} is for data sets; a benchmark has its own")
    elif args.allow_partial:
        raise UserError("--allow-partial is for --benchmark; part of a data set is --split 'NAME[:1000]'")
    options = dict(
        data=args.data,
        limit=args.limit,
        batch_size=args.batch_size,
        views=args.views,
        json_file=args.json,
        predictions_file=args.predictions,
        mesh=parse_mesh(args.mesh) if args.mesh else None,
    )
    with distributed_run(args):
        if args.benchmark is not None:
            options |= dict(split=args.split, allow_partial=args.allow_partial)
            evaluate_benchmarks(args.checkpoint, args.benchmark, **options)
        else:
            split = args.split or "heldout"
            options |= dict(split=split, control=args.control, metrics=args.metric or ("exact",))
            options |= dict(show_wrong=args.show_wrong or 0, max_new_tokens=args.max_new_tokens or 32)
            runner.evaluate_checkpoint(args.checkpoint, **options)
