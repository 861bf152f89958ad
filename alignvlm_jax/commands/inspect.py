"""`alignvlm inspect`."""

import argparse
import pathlib

from alignvlm_jax.commands.arguments import Commands, positive

DESCRIPTION = """\
Write one HTML page that shows what a model sees: point at a patch and read the words
ALIGN makes of it, type a word and see where on the page it is, ask a question and see
which patches the answer leaned on. The page needs no network and no server.
"""

EPILOG = """\
examples:
  alignvlm inspect --checkpoint nano PAGE.png --out page.html
  alignvlm inspect --checkpoint runs/demo/checkpoint runs/demo/example.png \\
      --question "What is the total?" --question "Which date is given?" --out page.html

docs/inspector.md says how to read the page and what its numbers are.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    summary = "a page that shows what words the patches of an image become"
    command = commands.add("inspect", run, summary, DESCRIPTION, EPILOG)
    command.add_argument("image", metavar="IMAGE", help="a picture of a page (PNG, JPEG, ...)")
    command.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="as for `alignvlm ask`; its connector must be ALIGN"
    )
    command.add_argument(
        "--question", action="append", default=[], help="what to ask, and to attribute; may be given several times"
    )
    command.add_argument("--out", default="page.html", metavar="FILE", help="the page (default: page.html)")
    command.add_argument(
        "--words", type=positive, default=32, metavar="K", help="likeliest words kept of each patch (default: 32)"
    )
    command.add_argument(
        "--attribution",
        choices=("tokens", "answer", "none"),
        default="tokens",
        help="which patches each token of an answer leaned on, or (faster) the answer as a whole (default: tokens)",
    )
    command.add_argument(
        "--steps", type=positive, default=32, metavar="N", help="gradients taken for an attribution (default: 32)"
    )
    command.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="longest answer (default: 128)"
    )


def run(args: argparse.Namespace) -> None:
    """Writes the page."""
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
