"""`alignvlm ask`: answers a question about an image."""

import argparse
import sys

import alignvlm_jax
from alignvlm_jax.commands.arguments import Commands, add_views, positive
from alignvlm_jax.locations import location

DESCRIPTION = """\
Answer a question about an image with a trained model. A line on stderr warns of an answer
that should not be believed: from an untrained connector, about a page that is shown much
smaller than the pages of the training, empty, cut off, or in a loop.
"""

EPILOG = """\
examples:
  alignvlm ask --checkpoint nano PAGE.png --question "What is the total?"
  alignvlm ask --checkpoint runs/demo/checkpoint runs/demo/example.png --question "What is the total?"

In Python:
  import alignvlm_jax
  reader = alignvlm_jax.load("runs/demo/checkpoint")
  print(reader.ask("runs/demo/example.png", "What is the total?"))
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    command = commands.add("ask", run, "answer a question about an image", DESCRIPTION, EPILOG)
    command.add_argument("image", type=location, metavar="IMAGE", help="image of a page (PNG, JPEG, ...)")
    command.add_argument(
        "--checkpoint",
        required=True,
        type=location,
        metavar="DIR",
        help='folder of a training run, exported folder, or "nano" for the trained model in the package',
    )
    command.add_argument("--question", required=True, metavar="TEXT", help="question about the image")
    command.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="maximum length of the answer (default: 128)"
    )
    add_views(command)


def run(args: argparse.Namespace) -> None:
    """Prints the answer."""
    from alignvlm_jax.data import images
    from alignvlm_jax.inference import reader
    from alignvlm_jax.inference.answers import warn_about

    # Errors in the question or the image are reported before the model is loaded, which takes long.
    question = reader.check_question(args.question)
    image = images.open_image(args.image)
    model = alignvlm_jax.load(args.checkpoint).with_views(args.views)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    answer = model.ask(image, question, max_new_tokens=args.max_new_tokens)
    print(answer, flush=True)
    warn_about(answer)
