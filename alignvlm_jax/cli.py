"""The `alignvlm` command: train, eval, ask, inspect, analyze, demo, reproduce.

Only argument handling lives here; each command calls the function that does the work. jax and its friends are imported
inside the commands, so that `--help` and a mistyped option answer at once.

Exit codes: 0 done, 2 the user can fix it (one line on stderr; `--debug` shows the traceback), 4 another process of the
run died (`parallel/watch.py`), 75 preempted (SIGTERM; the run was saved), 130 interrupted.
"""

import argparse
import glob
import logging
import math
import os
import pathlib
import sys
import traceback
from collections.abc import Sequence

import alignvlm_jax
from alignvlm_jax.errors import UserError

DESCRIPTION = """\
AlignVLM in JAX: a vision-language model for documents whose connector says what it
sees in the language model's own words.

start here:
  alignvlm demo                       draw documents, train a nano model on them, score it
  alignvlm ask --checkpoint runs/demo/checkpoint PAGE.png --question "What is the total?"
"""

TRAIN_DESCRIPTION = """\
Train a model through the stages of a config file. A stage says what is trainable, on
which data, for how long and how fast. Before each stage a table of the parts of the
model shows how many parameters each has and whether it is trained or frozen.

The same command again resumes where it stopped: from the last checkpoint in WORKDIR,
with the data in the same order.
"""

TRAIN_EPILOG = """\
examples:
  alignvlm train --config configs/nano.py --workdir runs/first
  alignvlm train --config configs/nano.py --workdir runs/seed1 --config.seed=1
  alignvlm train --config configs/nano.py --workdir runs/mlp --config.model.connector=mlp
  alignvlm train --config configs/nano.py --workdir runs/more --init-from runs/first
  alignvlm train --config configs/nano.py --workdir runs/scored --config.evaluation.every_steps=100

Any field of the config can be set with --config.path.to.key=value; a name that does not
exist is refused with the nearest right one. `configs/nano.py` is looked for here first,
then among the configs shipped with the package.

WORKDIR then holds config.json, tokenizer/, the checkpoints and TensorBoard event files
(`pip install tensorboard`, `tensorboard --logdir WORKDIR`); it is what --checkpoint of `eval` and `ask` wants.
"""

EVAL_DESCRIPTION = """\
Score a checkpoint on documents it has not seen: every question is answered by free
greedy decoding and counts as right only if the answer matches exactly. The table has
a row for each family of documents, one for the font that training never saw, and 95 %
confidence intervals.

With --benchmark: on published benchmarks, by their official scores, beside the paper's.
Answers are kept as they come; the same command goes on where it was stopped.
"""

EVAL_EPILOG = """\
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

ASK_DESCRIPTION = """\
Ask a trained model about an image and print its answer.
"""

ASK_EPILOG = """\
examples:
  alignvlm ask --checkpoint nano PAGE.png --question "What is the total?"
  alignvlm ask --checkpoint runs/demo/checkpoint runs/demo/example.png --question "What is the total?"

the same in Python:
  import alignvlm_jax
  reader = alignvlm_jax.load("runs/demo/checkpoint")
  print(reader.ask("runs/demo/example.png", "What is the total?"))
"""

INSPECT_DESCRIPTION = """\
Write one HTML page that shows what a model sees: point at a patch and read the words
ALIGN makes of it, type a word and see where on the page it is, ask a question and see
which patches the answer leaned on. The page needs no network and no server.
"""

INSPECT_EPILOG = """\
examples:
  alignvlm inspect --checkpoint nano PAGE.png --out page.html
  alignvlm inspect --checkpoint runs/demo/checkpoint runs/demo/example.png \\
      --question "What is the total?" --question "Which date is given?" --out page.html

docs/inspector.md says how to read the page and what its numbers are.
"""

DEMO_DESCRIPTION = """\
The whole path in one command, on a CPU, in about a quarter of an hour: draw a corpus of
synthetic documents, start from the shipped nano backbones (a vision encoder that sees,
a language model that speaks), align and train them in three stages, and score the
result on held-out documents beside its honest controls.

Writes OUT/results.json, OUT/example.png and OUT/checkpoint. The same command again
resumes: what is done is not done twice.
"""

DEMO_EPILOG = """\
examples:
  alignvlm demo
  alignvlm demo --out runs/seed1 --config.seed=1
"""

ANALYZE_DESCRIPTION = """\
Measure what a checkpoint does, on the pages of a data set. Each analysis writes its
figures as JSON, a picture, and a paragraph that reads the picture, into OUT.
"""

ANALYZE_EPILOG = """\
examples:
  alignvlm analyze noise --checkpoint nano --data data/synthetic/documents --out runs/noise
  alignvlm analyze noise --checkpoint runs/align --checkpoint runs/mlp --data DIR --out runs/noise

`alignvlm analyze ANALYSIS --help` says more of each; docs/analyses.md shows what they find.
"""

GEOMETRY_DESCRIPTION = """\
Where visual tokens lie among the text embeddings: both in the plane in which they vary
most (PCA), and the distance of visual tokens to the nearest text embedding and to the
convex hull of all of them, each with a proof (a plane that separates, or a mixture).
"""

GEOMETRY_EPILOG = """\
examples:
  alignvlm analyze geometry --checkpoint nano --data DIR --out runs/geometry
  alignvlm analyze geometry --checkpoint runs/align --checkpoint runs/mlp --data DIR --out runs/geometry

Asks no questions: --limit and --batch-size have nothing to limit here.
"""

VOCABULARY_DESCRIPTION = """\
Which words ALIGN uses: the mean of P over the patches of many pages, how many words
carry its mass, and the score of models pruned to the words used most. --prune and
--save write such a model as a checkpoint of its own, smaller, for `alignvlm ask`,
`alignvlm eval` and tools/export_pytorch.py (not for training).
"""

VOCABULARY_EPILOG = """\
examples:
  alignvlm analyze vocabulary --checkpoint nano --data DIR --out runs/words --limit 300
  alignvlm analyze vocabulary --checkpoint runs/1b --data DIR --out runs/words --sizes 1000,3400,128256
  alignvlm analyze vocabulary --checkpoint runs/1b --data DIR --out runs/words --sizes none --prune 3400 --save runs/3k

Words are counted on --usage-split and pruned models scored on --split: not on the
same pages. Every size is one evaluation of LIMIT questions, or two: with LN_V's
statistics of all words, and of the words kept.
"""

NOISE_DESCRIPTION = """\
How much noise a connector stands. Gaussian noise of growing sigma on the encoder's
features, just before the connector: how far the score falls, and how far the visual
tokens move (cosine distance, as in the paper and less the mean text embedding). Then
noise on the page itself: blur, JPEG, rotation, resolution.
"""

NOISE_EPILOG = """\
examples:
  alignvlm analyze noise --checkpoint nano --data DIR --out runs/noise --limit 300
  alignvlm analyze noise --checkpoint runs/align --checkpoint runs/mlp --data DIR --out runs/noise
  alignvlm analyze noise --checkpoint runs/8b --data DIR --out runs/noise --sigmas 0,3 --corruptions none
  alignvlm analyze noise --checkpoint nano --data DIR --out runs/noise --corruptions blur=0.5,1 --corruptions jpeg=20

Every sigma and every level is one evaluation of LIMIT questions.
"""

NAMES_DESCRIPTION = """\
Whether rare names are pulled to commoner ones, the failure that the paper names. DATA is
a corpus whose names differ in rarity by lot and in nothing else: error against rarity,
how often a name is taken for a commoner look-alike, and whose fault it is: the same
questions to the decoder alone, and what the visual tokens said.
"""

NAMES_EPILOG = """\
examples:
  python -c 'from alignvlm_jax.data.synthetic import names; names.build_names_corpus("data/names")'
  alignvlm analyze names --checkpoint runs/align --data data/names --out runs/names
  alignvlm analyze names --checkpoint runs/align --checkpoint runs/extra --data data/names --out runs/names

The figures say something of a model that was trained on the corpus's training pages; `alignvlm reproduce --only names`
trains some.
"""

REPRODUCE_DESCRIPTION = """\
The paper's comparison of connectors at a scale that a CPU trains in minutes a run: ALIGN, MLP, Perceiver, Ovis,
H-Reducer and HoneyBee's C-Abstractor from the same backbones, on the same pages in the same order, for the same number
of steps, with the same number of tuning trials. Writes OUT/report.md and plots.

Every run has its own folder, whose result.json stays when it is done and is never made again: stop it with Ctrl-C
whenever you like, and the same command goes on. The report is written from what is there.
"""

REPRODUCE_EPILOG = """\
examples:
  alignvlm reproduce --out runs/reproduce
  alignvlm reproduce --out runs/reproduce --jobs 2                   # two runs side by side, a core each
  alignvlm reproduce --out runs/reproduce --seeds 1 --only accuracy  # the main table, one seed
  alignvlm reproduce --out runs/reproduce --report-only

A run has a fixed number of steps, equal for all (configs/reproduce.py). --minutes is a limit: a run that takes longer
is stopped, named in the report and left out of its tables; a higher limit goes on with it. It is meant for a run that
has the machine to itself: of two side by side each gets twice as much.
"""

CONTROLS = ("none", "blank", "wrong")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    _quiet_logs(args.debug)
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
    # --debug is accepted before and after the command; SUPPRESS keeps the second from resetting the first.
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the traceback behind an error, and the log lines of the libraries",
    )
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, "parents": [debug]}
    parser = argparse.ArgumentParser(prog="alignvlm", description=DESCRIPTION, **style)
    parser.add_argument("--version", action="version", version=f"alignvlm_jax {alignvlm_jax.__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")

    def add(name, run, summary, description, epilog, takes_overrides=False, distributed=False):
        command = subparsers.add_parser(name, help=summary, description=description, epilog=epilog, **style)
        if distributed:
            _add_distributed_arguments(command)
        command.set_defaults(run=run, takes_overrides=takes_overrides)
        return command

    summary = "train through the stages of a config"
    train = add("train", _train, summary, TRAIN_DESCRIPTION, TRAIN_EPILOG, takes_overrides=True, distributed=True)
    train.add_argument("--config", required=True, metavar="FILE", help="the experiment, such as configs/nano.py")
    train.add_argument("--workdir", required=True, metavar="DIR", help="where everything goes; resumed if it exists")
    train.add_argument(
        "--allow-config-change",
        type=lambda text: [key.strip().removeprefix("config.") for key in text.split(",") if key.strip()],
        default=[],
        metavar="KEY[,KEY]",
        help="resume although these keys of the config, which change what is computed, are not what they were",
    )
    train.add_argument(
        "--init-from",
        metavar="CHECKPOINT",
        help="start with this checkpoint's weights and tokenizer, not with the backbones (same as --config.init_from)",
    )

    summary = "score a checkpoint on held-out documents"
    evaluate = add("eval", _eval, summary, EVAL_DESCRIPTION, EVAL_EPILOG, distributed=True)
    evaluate.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help='the workdir of a training run, an exported folder, or "nano"',
    )
    evaluate.add_argument("--data", metavar="DIR", help="folder of the data set (default: the run's own)")
    evaluate.add_argument(
        "--benchmark",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        metavar="NAME[,NAME]",
        help="score these published benchmarks, whose files are in --data (an unknown name lists them)",
    )
    evaluate.add_argument("--split", help="which split to score (default: heldout, or the benchmark's own)")
    evaluate.add_argument("--control", choices=CONTROLS, default="none", help="replace the images (default: none)")
    evaluate.add_argument(
        "--limit", type=_positive, metavar="N", help="score the first N questions (of each benchmark)"
    )
    evaluate.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="questions decoded at once")
    evaluate.add_argument("--json", metavar="FILE", help="write the figures here")
    evaluate.add_argument(
        "--predictions", metavar="FILE", help="write one JSON line per question here; of benchmarks, gone on with"
    )

    evaluate.add_argument(
        "--mesh",
        metavar="data=2,fsdp=2,tensor=2",
        help="spread weights and questions over all devices so (default: one device; with several processes, fsdp)",
    )

    ask = add("ask", _ask, "ask about an image", ASK_DESCRIPTION, ASK_EPILOG)
    ask.add_argument("image", metavar="IMAGE", help="a picture of a page (PNG, JPEG, ...)")
    ask.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help='the workdir of a training run, an exported folder, or "nano": the trained model shipped with the package',
    )
    ask.add_argument("--question", required=True, help="what you want to know")
    ask.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N", help="longest answer (default: 128)")

    summary = "a page that shows what words the patches of an image become"
    inspect = add("inspect", _inspect, summary, INSPECT_DESCRIPTION, INSPECT_EPILOG)
    inspect.add_argument("image", metavar="IMAGE", help="a picture of a page (PNG, JPEG, ...)")
    inspect.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="as for `alignvlm ask`; its connector must be ALIGN"
    )
    inspect.add_argument(
        "--question", action="append", default=[], help="what to ask, and to attribute; may be given several times"
    )
    inspect.add_argument("--out", default="page.html", metavar="FILE", help="the page (default: page.html)")
    inspect.add_argument(
        "--words", type=_positive, default=32, metavar="K", help="likeliest words kept of each patch (default: 32)"
    )
    inspect.add_argument(
        "--attribution",
        choices=("tokens", "answer", "none"),
        default="tokens",
        help="which patches each token of an answer leaned on, or (faster) the answer as a whole (default: tokens)",
    )
    inspect.add_argument(
        "--steps", type=_positive, default=32, metavar="N", help="gradients taken for an attribution (default: 32)"
    )
    inspect.add_argument(
        "--max-new-tokens", type=_positive, default=128, metavar="N", help="longest answer (default: 128)"
    )

    analyze = add("analyze", None, "noise, and what else a checkpoint does", ANALYZE_DESCRIPTION, ANALYZE_EPILOG)
    analyses = analyze.add_subparsers(title="analyses", dest="analysis", required=True, metavar="ANALYSIS")

    def add_analysis(name, run, summary, description, epilog):
        """One of `alignvlm analyze`, with the arguments that all of them take."""
        command = analyses.add_parser(name, help=summary, description=description, epilog=epilog, **style)
        command.add_argument(
            "--checkpoint",
            required=True,
            action="append",
            metavar="DIR",
            help='a workdir, an exported folder, or "nano"; several may be given, to be compared',
        )
        command.add_argument("--data", required=True, metavar="DIR", help="folder of the data set")
        command.add_argument("--split", default="heldout", help="which split of it (default: heldout)")
        command.add_argument("--out", required=True, metavar="DIR", help="where figures, pictures and text go")
        command.add_argument("--limit", type=_positive, metavar="N", help="ask the first N questions only")
        command.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="questions decoded at once")
        command.add_argument("--seed", type=_at_least_0, default=0, metavar="N", help="of what is random (default: 0)")
        command.set_defaults(run=run)
        return command

    summary = "noise on the features and on the page"
    noise = add_analysis("noise", _analyze_noise, summary, NOISE_DESCRIPTION, NOISE_EPILOG)
    noise.add_argument("--sigmas", type=_numbers, metavar="S[,S]", help="default: 0,0.5,1,2,3,5")
    noise.add_argument(
        "--corruptions",
        action="append",
        metavar="KIND=LEVEL[,LEVEL]",
        help="of the page: blur, jpeg, rotation, resolution; or none (default: all four, each at four levels)",
    )

    summary = "the words ALIGN uses, and how many it can do without"
    words = add_analysis("vocabulary", _analyze_vocabulary, summary, VOCABULARY_DESCRIPTION, VOCABULARY_EPILOG)
    words.add_argument("--usage-split", default="train", help="which split words are counted on (default: train)")
    words.add_argument("--pages", type=_positive, default=100, metavar="N", help="on how many pages (default: 100)")
    words.add_argument("--sizes", type=_sizes, metavar="K[,K]", help="words kept, or none (default: by their mass)")
    words.add_argument("--prune", type=_positive, metavar="K", help="write a checkpoint pruned to K words ...")
    words.add_argument("--save", metavar="DIR", help="... here")
    words.add_argument(
        "--statistics",
        choices=("full", "kept"),
        default="full",
        help="of which words LN_V takes mean and variance in the pruned checkpoint (default: full)",
    )

    summary = "where visual tokens lie among the text embeddings"
    where = add_analysis("geometry", _analyze_geometry, summary, GEOMETRY_DESCRIPTION, GEOMETRY_EPILOG)
    where.add_argument("--pages", type=_positive, default=20, metavar="N", help="pages looked at (default: 20)")
    where.add_argument("--tokens", type=_positive, default=1000, metavar="N", help="of their visual tokens (1000)")
    where.add_argument("--hull-tokens", type=_positive, default=64, metavar="N", help="... to the hull (64)")

    summary = "rare names, and their commoner look-alikes"
    add_analysis("names", _analyze_names, summary, NAMES_DESCRIPTION, NAMES_EPILOG)

    demo = add("demo", _demo, "the whole path, on a CPU, in minutes", DEMO_DESCRIPTION, DEMO_EPILOG, True)
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="where everything goes (default: runs/demo)")
    demo.add_argument("--config", default="configs/nano.py", metavar="FILE", help="default: configs/nano.py")

    summary = "the paper's connectors compared under one recipe"
    reproduce = add("reproduce", _reproduce, summary, REPRODUCE_DESCRIPTION, REPRODUCE_EPILOG, True)
    reproduce.add_argument("--out", required=True, metavar="DIR", help="where everything goes; resumed if it exists")
    reproduce.add_argument("--seeds", type=_positive, default=3, metavar="N", help="runs of each kind (default: 3)")
    reproduce.add_argument(
        "--minutes", type=float, default=3.0, metavar="N", help="most minutes that a run may train (default: 3)"
    )
    reproduce.add_argument("--jobs", type=_positive, default=1, metavar="K", help="runs side by side (default: 1)")
    reproduce.add_argument("--only", type=_names, default=(), metavar="PART[,PART]", help="some parts only")
    reproduce.add_argument(
        "--connectors", type=_names, metavar="NAME[,NAME]", help="some connectors only (default: all six)"
    )
    reproduce.add_argument(
        "--encoders",
        type=_names,
        metavar="NAME[,NAME]",
        help="transcription (never saw labels per patch), patches (the shipped one), or both (default)",
    )
    reproduce.add_argument(
        "--vision", type=_pair, action="append", default=[], metavar="ENCODER=DIR", help="another folder for an encoder"
    )
    reproduce.add_argument("--data", metavar="DIR", help="folder of data sets drawn before (default: OUT/data)")
    reproduce.add_argument("--questions", type=_positive, metavar="N", help="ask the first N only (default: all)")
    reproduce.add_argument("--config", default="configs/reproduce.py", metavar="FILE", help="the recipe")
    reproduce.add_argument("--report-only", action="store_true", help="write the report on what is there")
    return parser, subparsers.choices


def _add_distributed_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group(
        "several processes",
        "One runs on each host, all with the same command. TPU pods, GKE and Slurm are recognised and need none of "
        "these; elsewhere each host is told who takes part.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="process 0, and a port that is free there")
    group.add_argument("--num-processes", type=_positive, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=_at_least_0, metavar="I", help="which of them this is, from 0")


def _joined(args: argparse.Namespace):
    from alignvlm_jax.parallel import distributed

    return distributed.joined(args.coordinator, args.num_processes, args.process_id)


def _train(args: argparse.Namespace) -> None:
    from alignvlm_jax import config, demo
    from alignvlm_jax.evaluation.during_training import during_training
    from alignvlm_jax.parallel import distributed
    from alignvlm_jax.training import loop

    if args.init_from:
        args.overrides.append(f"init_from={args.init_from}")
    experiment = config.load(args.config, args.overrides)
    with _joined(args):
        if distributed.is_primary():
            demo.draw_missing_corpus(experiment)
        distributed.gather_json("drawn")
        progress = loop.train(
            experiment,
            pathlib.Path(args.workdir),
            score=during_training(experiment),
            allow_config_change=args.allow_config_change,
        ).progress
        if distributed.is_primary():
            print(f"trained {progress.step} steps in {progress.train_seconds:.0f} s; score it with:")
            print(f"  alignvlm eval --checkpoint {args.workdir}")


def _eval(args: argparse.Namespace) -> None:
    from alignvlm_jax.evaluation import runner
    from alignvlm_jax.evaluation.benchmarks.runner import evaluate_benchmarks
    from alignvlm_jax.parallel.mesh import parse_mesh

    mesh = parse_mesh(args.mesh) if args.mesh else None
    if args.benchmark:
        if not args.data:
            raise UserError("--benchmark needs --data: the folder that the benchmark's files are in")
        if args.control != "none":
            raise UserError("--control is for the run's own documents, not for benchmarks")
        with _joined(args):
            evaluate_benchmarks(
                args.checkpoint,
                args.benchmark,
                data=args.data,
                split=args.split,
                limit=args.limit,
                batch_size=args.batch_size,
                json_file=args.json,
                predictions_file=args.predictions,
                mesh=mesh,
            )
        return
    with _joined(args):
        runner.evaluate_checkpoint(
            args.checkpoint,
            data=args.data,
            split=args.split or "heldout",
            control=args.control,
            limit=args.limit,
            batch_size=args.batch_size,
            json_file=args.json,
            predictions_file=args.predictions,
            mesh=mesh,
        )


def _ask(args: argparse.Namespace) -> None:
    from alignvlm_jax.data import images
    from alignvlm_jax.inference import reader

    # What can be wrong with the question and the image is said before the model is loaded.
    question = reader.check_question(args.question)
    image = images.open_image(args.image)
    print(alignvlm_jax.load(args.checkpoint).ask(image, question, max_new_tokens=args.max_new_tokens))


def _inspect(args: argparse.Namespace) -> None:
    from alignvlm_jax import inspector
    from alignvlm_jax.data import images
    from alignvlm_jax.inference import reader

    questions = [reader.check_question(question) for question in args.question]
    inspector.inspect_to_file(
        args.checkpoint,
        images.open_image(args.image),
        questions,
        args.out,
        name=pathlib.Path(args.image).name,
        config=inspector.InspectConfig(args.words, args.attribution, args.steps, args.max_new_tokens),
    )


def _analyze_noise(args: argparse.Namespace) -> None:
    from alignvlm_jax.analysis import noise

    noise.run(
        args.checkpoint,
        args.data,
        args.out,
        split=args.split,
        limit=args.limit,
        sigmas=args.sigmas or noise.SIGMAS,
        corruptions=noise.parse_corruptions(args.corruptions),
        seed=args.seed,
        batch_size=args.batch_size,
    )


def _analyze_geometry(args: argparse.Namespace) -> None:
    from alignvlm_jax.analysis import geometry

    geometry.run(
        args.checkpoint,
        args.data,
        args.out,
        split=args.split,
        pages=args.pages,
        tokens=args.tokens,
        hull_tokens=args.hull_tokens,
        seed=args.seed,
    )


def _analyze_names(args: argparse.Namespace) -> None:
    from alignvlm_jax.analysis import rare_names

    rare_names.run(
        args.checkpoint,
        args.data,
        args.out,
        split=args.split,
        limit=args.limit,
        batch_size=args.batch_size,
        seed=args.seed,
    )


def _analyze_vocabulary(args: argparse.Namespace) -> None:
    from alignvlm_jax.analysis import vocabulary

    vocabulary.run(
        args.checkpoint,
        args.data,
        args.out,
        split=args.split,
        usage_split=args.usage_split,
        pages=args.pages,
        sizes=args.sizes,
        limit=args.limit,
        batch_size=args.batch_size,
        prune=args.prune,
        save=args.save,
        statistics=args.statistics,
    )


def _demo(args: argparse.Namespace) -> None:
    from alignvlm_jax import config, demo

    demo.run(config.load(args.config, args.overrides), pathlib.Path(args.out))


def _reproduce(args: argparse.Namespace) -> None:
    from alignvlm_jax.reproduce.options import Options
    from alignvlm_jax.reproduce.run import reproduce

    chosen = {name: getattr(args, name) for name in ("connectors", "encoders") if getattr(args, name)}
    options = Options(
        seeds=args.seeds,
        minutes=args.minutes,
        config=args.config,
        overrides=tuple(args.overrides),
        data=args.data,
        vision=tuple(args.vision),
        questions=args.questions,
        **chosen,
    )
    reproduce(options, pathlib.Path(args.out), at_once=args.jobs, only=args.only, report_only=args.report_only)


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


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return value


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _at_least_0(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, got {text!r}")
    return int(text)


def _numbers(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(math.isfinite(value) and value >= 0 for value in values):
        raise argparse.ArgumentTypeError(f"expected numbers with commas between, 0 or more, got {text!r}")
    return values


def _sizes(text: str) -> list[int]:
    return [] if text == "none" else [_positive(part) for part in text.split(",")]


def _quiet_logs(debug: bool) -> None:
    """Keeps the libraries' notes off the terminal, where the tables and progress bars are."""
    if debug:
        logging.basicConfig(level=logging.INFO)
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")):
        # libtpu may be installed without a TPU, to compile for one; it then complains at length of having none.
        os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "4")
    for name in ("absl", "jax", "orbax", "grain", "etils", "tensorflow_datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
