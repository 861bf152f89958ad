"""`alignvlm inspect`: writes an HTML page about what a model reads in an image."""

import argparse
import pathlib

from alignvlm_jax.commands.arguments import Commands, positive
from alignvlm_jax.locations import location, source_location

DESCRIPTION = """\
Write an HTML page that shows what a model reads in an image. Point at a patch to see the
words that ALIGN maps it to, or type a word to see where it occurs. With --question, it
also shows which patches an answer depends on. The page works offline and needs no server.
"""

EPILOG = """\
examples:
  alignvlm inspect --checkpoint nano PAGE.png --out page.html
  alignvlm inspect --checkpoint runs/demo/checkpoint runs/demo/example.png \\
      --question "What is the total?" --question "Which date is given?" --out page.html

docs/inspector.md explains the page and its numbers.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    summary = "write an HTML page that shows the words of each patch"
    command = commands.add("inspect", run, summary, DESCRIPTION, EPILOG)
    command.add_argument(
        "image",
        type=location,
        metavar="IMAGE",
        help="image of a page (PNG, JPEG, ...), or a page of a PDF (FILE.pdf#page=3)",
    )
    command.add_argument(
        "--checkpoint",
        required=True,
        type=source_location,
        metavar="DIR",
        help="checkpoint as for `alignvlm ask`; its connector must be ALIGN",
    )
    command.add_argument(
        "--question",
        action="append",
        default=[],
        metavar="TEXT",
        help="question to answer and to attribute to patches; may be repeated",
    )
    command.add_argument(
        "--out", type=location, default="page.html", metavar="FILE", help="output file (default: page.html)"
    )
    command.add_argument(
        "--words", type=positive, default=32, metavar="K", help="number of most likely words per patch (default: 32)"
    )
    command.add_argument(
        "--attribution",
        choices=("tokens", "answer", "none"),
        default="tokens",
        help="attribute each token of an answer to patches, or the answer as a whole, which is faster "
        "(default: tokens)",
    )
    command.add_argument(
        "--steps", type=positive, default=32, metavar="N", help="number of gradients per attribution (default: 32)"
    )
    command.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="maximum length of an answer (default: 128)"
    )


def run(args: argparse.Namespace) -> None:
    """Writes the HTML page."""
    from alignvlm_jax import inspector
    from alignvlm_jax.data import images
    from alignvlm_jax.inference.prompts import check_question
    from alignvlm_jax.output_files import check_distinct

    check_distinct(image=args.image, out=args.out)
    questions = [check_question(question) for question in args.question]
    inspector.inspect_to_file(
        args.checkpoint,
        images.open_image(args.image),
        questions,
        args.out,
        name=pathlib.Path(args.image).name,
        config=inspector.InspectConfig(args.words, args.attribution, args.steps, args.max_new_tokens),
    )
