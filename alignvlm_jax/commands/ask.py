"""`alignvlm ask`."""

import argparse

import alignvlm_jax
from alignvlm_jax.commands.arguments import Commands, add_views, positive

DESCRIPTION = """\
Ask a trained model about an image and print its answer.
"""

EPILOG = """\
examples:
  alignvlm ask --checkpoint nano PAGE.png --question "What is the total?"
  alignvlm ask --checkpoint runs/demo/checkpoint runs/demo/example.png --question "What is the total?"

the same in Python:
  import alignvlm_jax
  reader = alignvlm_jax.load("runs/demo/checkpoint")
  print(reader.ask("runs/demo/example.png", "What is the total?"))
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    command = commands.add("ask", run, "ask about an image", DESCRIPTION, EPILOG)
    command.add_argument("image", metavar="IMAGE", help="a picture of a page (PNG, JPEG, ...)")
    command.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help='the workdir of a training run, an exported folder, or "nano": the trained model shipped with the package',
    )
    command.add_argument("--question", required=True, help="what you want to know")
    command.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="longest answer (default: 128)"
    )
    add_views(command)


def run(args: argparse.Namespace) -> None:
    """Prints the answer."""
    from alignvlm_jax.data import images
    from alignvlm_jax.inference import reader

    # What can be wrong with the question and the image is said before the model is loaded.
    question = reader.check_question(args.question)
    image = images.open_image(args.image)
    model = alignvlm_jax.load(args.checkpoint).with_views(args.views)
    print(model.ask(image, question, max_new_tokens=args.max_new_tokens))
