"""`alignvlm analyze`: noise, vocabulary, geometry, names."""

import argparse

from alignvlm_jax.commands.arguments import Commands, add_views, at_least_0, numbers, positive, sizes

DESCRIPTION = """\
Measure what a checkpoint does, on the pages of a data set. Each analysis writes its
figures as JSON, a picture, and a paragraph that reads the picture, into OUT.
"""

EPILOG = """\
examples:
  alignvlm analyze noise --checkpoint nano --data data/synthetic/documents --out runs/noise
  alignvlm analyze noise --checkpoint runs/align --checkpoint runs/mlp --data DIR --out runs/noise

`alignvlm analyze ANALYSIS --help` says more of each; docs/analyses.md shows what they find.
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
  alignvlm analyze names --checkpoint runs/align --data data/names --out runs/names --views 4

The figures say something of a model that was trained on the corpus's training pages; `alignvlm reproduce --only names`
trains some. With --views each checkpoint is asked twice: as it is, and with every page looked at K times.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    analyze = commands.add("analyze", None, "noise, and what else a checkpoint does", DESCRIPTION, EPILOG)
    analyses = Commands(analyze, title="analyses", dest="analysis", metavar="ANALYSIS")

    def add_analysis(*args):
        """One of `alignvlm analyze`, with the arguments that all of them take."""
        command = analyses.add(*args)
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
        command.add_argument("--limit", type=positive, metavar="N", help="ask the first N questions only")
        command.add_argument("--batch-size", type=positive, default=32, metavar="N", help="questions decoded at once")
        command.add_argument("--seed", type=at_least_0, default=0, metavar="N", help="of what is random (default: 0)")
        return command

    summary = "noise on the features and on the page"
    noise = add_analysis("noise", _analyze_noise, summary, NOISE_DESCRIPTION, NOISE_EPILOG)
    noise.add_argument("--sigmas", type=numbers, metavar="S[,S]", help="default: 0,0.5,1,2,3,5")
    noise.add_argument(
        "--corruptions",
        action="append",
        metavar="KIND=LEVEL[,LEVEL]",
        help="of the page: blur, jpeg, rotation, resolution; or none (default: all four, each at four levels)",
    )

    summary = "the words ALIGN uses, and how many it can do without"
    words = add_analysis("vocabulary", _analyze_vocabulary, summary, VOCABULARY_DESCRIPTION, VOCABULARY_EPILOG)
    words.add_argument("--usage-split", default="train", help="which split words are counted on (default: train)")
    words.add_argument("--pages", type=positive, default=100, metavar="N", help="on how many pages (default: 100)")
    words.add_argument("--sizes", type=sizes, metavar="K[,K]", help="words kept, or none (default: by their mass)")
    words.add_argument("--prune", type=positive, metavar="K", help="write a checkpoint pruned to K words ...")
    words.add_argument("--save", metavar="DIR", help="... here")
    words.add_argument(
        "--statistics",
        choices=("full", "kept"),
        default="full",
        help="of which words LN_V takes mean and variance in the pruned checkpoint (default: full)",
    )

    summary = "where visual tokens lie among the text embeddings"
    where = add_analysis("geometry", _analyze_geometry, summary, GEOMETRY_DESCRIPTION, GEOMETRY_EPILOG)
    where.add_argument("--pages", type=positive, default=20, metavar="N", help="pages looked at (default: 20)")
    where.add_argument("--tokens", type=positive, default=1000, metavar="N", help="of their visual tokens (1000)")
    where.add_argument("--hull-tokens", type=positive, default=64, metavar="N", help="... to the hull (64)")

    summary = "rare names, and their commoner look-alikes"
    names = add_analysis("names", _analyze_names, summary, NAMES_DESCRIPTION, NAMES_EPILOG)
    add_views(names)


def _analyze_noise(args: argparse.Namespace) -> None:
    from alignvlm_jax.analysis.noise.corruptions import parse_corruptions
    from alignvlm_jax.analysis.noise.measure import SIGMAS
    from alignvlm_jax.analysis.noise.run import run

    run(
        args.checkpoint,
        args.data,
        args.out,
        split=args.split,
        limit=args.limit,
        sigmas=args.sigmas or SIGMAS,
        corruptions=parse_corruptions(args.corruptions),
        seed=args.seed,
        batch_size=args.batch_size,
    )


def _analyze_vocabulary(args: argparse.Namespace) -> None:
    from alignvlm_jax.analysis.vocabulary.run import run

    run(
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


def _analyze_geometry(args: argparse.Namespace) -> None:
    from alignvlm_jax.analysis.geometry.run import run

    run(
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
    from alignvlm_jax.analysis.rare_names.run import run

    run(
        args.checkpoint,
        args.data,
        args.out,
        split=args.split,
        limit=args.limit,
        batch_size=args.batch_size,
        views=args.views,
        seed=args.seed,
    )
