"""`alignvlm analyze`: noise, vocabulary, geometry and names."""

import argparse
from collections.abc import Callable
from typing import Any

from alignvlm_jax.commands.arguments import Commands, add_views, non_negative, number_list, positive, size_list
from alignvlm_jax.locations import location, source_location

DESCRIPTION = """\
Analyze a checkpoint on the pages of a data set. Each analysis writes its numbers as
JSON, a plot, and a paragraph that explains the plot to OUT.
"""

EPILOG = """\
examples:
  alignvlm analyze noise --checkpoint nano --data data/synthetic/documents --out runs/noise
  alignvlm analyze noise --checkpoint runs/align --checkpoint runs/mlp --data DIR --out runs/noise

`alignvlm analyze ANALYSIS --help` explains an analysis; docs/analyses.md shows results.
"""

NOISE_DESCRIPTION = """\
Measure the robustness of a connector to noise. Gaussian noise with increasing sigma is
added to the encoder's features, just before the connector. The analysis reports the loss
of score, and the shift of the visual tokens (cosine distance as in the paper, and after
subtraction of the mean text embedding). It then corrupts the pages themselves: blur,
JPEG, rotation and resolution.
"""

NOISE_EPILOG = """\
examples:
  alignvlm analyze noise --checkpoint nano --data DIR --out runs/noise --limit 300
  alignvlm analyze noise --checkpoint runs/align --checkpoint runs/mlp --data DIR --out runs/noise
  alignvlm analyze noise --checkpoint runs/8b --data DIR --out runs/noise --sigmas 0,3 --corruptions none
  alignvlm analyze noise --checkpoint nano --data DIR --out runs/noise --corruptions blur=0.5,1 --corruptions jpeg=20

Every sigma and every level takes one evaluation on LIMIT questions.
"""

VOCABULARY_DESCRIPTION = """\
Find the words that ALIGN uses: the mean of P over the patches of many pages, the number
of words that carry its mass, and the score of models pruned to the most used words.
--prune and --save write a pruned model as a smaller checkpoint for `alignvlm ask`,
`alignvlm eval` and `alignvlm export`. It cannot be trained.
"""

VOCABULARY_EPILOG = """\
examples:
  alignvlm analyze vocabulary --checkpoint nano --data DIR --out runs/words --limit 300
  alignvlm analyze vocabulary --checkpoint runs/1b --data DIR --out runs/words --sizes 1000,3400,128256
  alignvlm analyze vocabulary --checkpoint runs/1b --data DIR --out runs/words --sizes none --prune 3400 --save runs/3k

Words are counted on --usage-split, and pruned models are scored on --split, so that the
pages differ. Every size takes one or two evaluations on LIMIT questions: with LN_V's
statistics of all words, and of the kept words.
"""

GEOMETRY_DESCRIPTION = """\
Locate visual tokens among the text embeddings: both in the plane in which they vary most
(PCA), and the distance of visual tokens to the nearest text embedding and to the convex
hull of all text embeddings, with a proof for each (a separating plane or a mixture).
"""

GEOMETRY_EPILOG = """\
examples:
  alignvlm analyze geometry --checkpoint nano --data DIR --out runs/geometry
  alignvlm analyze geometry --checkpoint runs/align --checkpoint runs/mlp --data DIR --out runs/geometry

This analysis asks no questions: --limit and --batch-size have no effect.
"""

NAMES_DESCRIPTION = """\
Test whether rare names are pulled to more common ones, the failure that the paper
describes. DATA is a corpus whose names differ only in their random rarity. The analysis
reports the error by rarity, and how often a name is taken for a more common look-alike.
To locate the cause, it asks the decoder alone the same questions, and reads the visual
tokens.
"""

NAMES_EPILOG = """\
examples:
  python -c 'from alignvlm_jax.data.synthetic import names; names.build_names_corpus("data/names")'
  alignvlm analyze names --checkpoint runs/align --data data/names --out runs/names
  alignvlm analyze names --checkpoint runs/align --checkpoint runs/mlp --data data/names --out runs/names
  alignvlm analyze names --checkpoint runs/align --data data/names --out runs/names --views 4

The results are meaningful only for models trained on the corpus's training pages;
`alignvlm reproduce --only names` trains some. With --views, each checkpoint is scored
twice: with one view and with K views of every page.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    analyze = commands.add("analyze", None, "measure noise, vocabulary, geometry and rare names", DESCRIPTION, EPILOG)
    analyses = Commands(analyze, title="analyses", dest="analysis", metavar="ANALYSIS")

    def add_analysis(*args):
        """Adds an analysis with the arguments that all of them take."""
        command = analyses.add(*args)
        command.add_argument(
            "--checkpoint",
            required=True,
            type=source_location,
            action="append",
            metavar="DIR",
            help='folder of a training run, exported folder, or "nano"; repeat it to compare several',
        )
        command.add_argument("--data", required=True, type=location, metavar="DIR", help="folder of the data set")
        command.add_argument("--split", default="heldout", metavar="NAME", help="split to use (default: heldout)")
        command.add_argument(
            "--out", required=True, type=location, metavar="DIR", help="output folder for numbers, plots and text"
        )
        command.add_argument("--limit", type=positive, metavar="N", help="ask only the first N questions")
        command.add_argument(
            "--batch-size", type=positive, default=32, metavar="N", help="questions decoded at once (default: 32)"
        )
        command.add_argument("--seed", type=non_negative, default=0, metavar="N", help="random seed (default: 0)")
        return command

    # Each analysis adds arguments of its own.
    summary = "noise on the features and on the pages"
    noise = add_analysis("noise", _analyze_noise, summary, NOISE_DESCRIPTION, NOISE_EPILOG)
    noise.add_argument(
        "--sigmas",
        type=number_list,
        metavar="S[,S]",
        help="standard deviations of the noise on the features (default: 0,0.5,1,2,3,5)",
    )
    noise.add_argument(
        "--corruptions",
        action="append",
        metavar="KIND=LEVEL[,LEVEL]",
        help="corruptions of the pages: blur, jpeg, rotation, resolution, or none (default: all, at four levels each)",
    )

    summary = "the words ALIGN uses, and the score with fewer words"
    vocabulary = add_analysis("vocabulary", _analyze_vocabulary, summary, VOCABULARY_DESCRIPTION, VOCABULARY_EPILOG)
    vocabulary.add_argument(
        "--usage-split", default="train", metavar="NAME", help="split on which words are counted (default: train)"
    )
    vocabulary.add_argument(
        "--pages", type=positive, default=100, metavar="N", help="pages on which words are counted (default: 100)"
    )
    vocabulary.add_argument(
        "--sizes",
        type=size_list,
        metavar="K[,K]",
        help="numbers of kept words to score, or none (default: chosen by the mass of P)",
    )
    vocabulary.add_argument(
        "--prune", type=positive, metavar="K", help="write a checkpoint pruned to K words (with --save)"
    )
    vocabulary.add_argument(
        "--save", type=location, metavar="DIR", help="folder of the pruned checkpoint (with --prune)"
    )
    vocabulary.add_argument(
        "--statistics",
        choices=("full", "kept"),
        default="full",
        help="in the pruned checkpoint, LN_V uses mean and variance of all words or of the kept ones (default: full)",
    )

    summary = "the position of visual tokens among the text embeddings"
    geometry = add_analysis("geometry", _analyze_geometry, summary, GEOMETRY_DESCRIPTION, GEOMETRY_EPILOG)
    geometry.add_argument("--pages", type=positive, default=20, metavar="N", help="number of pages (default: 20)")
    geometry.add_argument(
        "--tokens", type=positive, default=1000, metavar="N", help="number of visual tokens (default: 1000)"
    )
    geometry.add_argument(
        "--hull-tokens",
        type=positive,
        default=64,
        metavar="N",
        help="number of visual tokens whose distance to the hull is computed (default: 64)",
    )

    summary = "rare names and their more common look-alikes"
    names = add_analysis("names", _analyze_names, summary, NAMES_DESCRIPTION, NAMES_EPILOG)
    add_views(names)


def _run(args: argparse.Namespace, run: Callable[..., Any], *names: str, **options: Any) -> None:
    """Runs an analysis with the named arguments of the command line, and with further options."""
    run(args.checkpoint, args.data, args.out, **{name: getattr(args, name) for name in names}, **options)


def _analyze_noise(args: argparse.Namespace) -> None:
    from alignvlm_jax.analysis.noise.corruptions import parse_corruptions
    from alignvlm_jax.analysis.noise.measure import SIGMAS
    from alignvlm_jax.analysis.noise.run import run

    _run(
        args,
        run,
        "split",
        "limit",
        "seed",
        "batch_size",
        sigmas=args.sigmas or SIGMAS,
        corruptions=parse_corruptions(args.corruptions),
    )


def _analyze_vocabulary(args: argparse.Namespace) -> None:
    from alignvlm_jax.analysis.vocabulary.run import run

    _run(args, run, "split", "usage_split", "pages", "sizes", "limit", "batch_size", "prune", "save", "statistics")


def _analyze_geometry(args: argparse.Namespace) -> None:
    from alignvlm_jax.analysis.geometry.run import run

    _run(args, run, "split", "pages", "tokens", "hull_tokens", "seed")


def _analyze_names(args: argparse.Namespace) -> None:
    from alignvlm_jax.analysis.rare_names.run import run

    _run(args, run, "split", "limit", "batch_size", "views", "seed")
