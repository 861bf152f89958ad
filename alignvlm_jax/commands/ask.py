"""`alignvlm ask`: answers a question about an image."""

import argparse
import contextlib
import os
import pathlib
import sys
from typing import Any

import alignvlm_jax
from alignvlm_jax.commands.arguments import Commands, add_views, positive
from alignvlm_jax.locations import is_local, location, source_location

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
    command.add_argument(
        "image",
        type=location,
        metavar="IMAGE",
        help="image of a page (PNG, JPEG, ...), a PDF, or one of its pages (FILE.pdf#page=3)",
    )
    command.add_argument(
        "--checkpoint",
        required=True,
        type=source_location,
        metavar="DIR",
        help='folder of a training run, exported folder or its name on the Hub, or "nano" for the model in the package',
    )
    command.add_argument("--question", required=True, metavar="TEXT", help="question about the image")
    command.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="maximum length of the answer (default: 128)"
    )
    add_views(command)


def run(args: argparse.Namespace) -> None:
    """Prints the answer."""
    from alignvlm_jax.data import images
    from alignvlm_jax.inference.answers import warn_about
    from alignvlm_jax.inference.prompts import check_question

    # Errors in the question or the image are reported before the model is loaded, which is slow.
    question = check_question(args.question)
    answer, notes = _answer(args, images.open_pages(args.image), question)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(answer, flush=True)
    warn_about(answer)


def _answer(args: argparse.Namespace, pages: Any, question: str) -> tuple[Any, tuple[str, ...]]:
    """Returns the answer to a question about open images, and notes about the checkpoint."""
    from alignvlm_jax.inference import prepared

    options = dict(max_new_tokens=args.max_new_tokens)
    entry, folder = _find_entry(args)
    if entry is not None:
        # There is no entry, or it has no program for a page of this size, or it is damaged.
        with contextlib.suppress(OSError, ValueError):
            model = prepared.PreparedModel(entry, folder).with_views(args.views)
            return model.ask(pages, question, **options), model.facts.notes
    model = alignvlm_jax.load(args.checkpoint).with_views(args.views)
    if entry is None:
        return model.ask(pages, question, **options), model.notes
    return model.ask_and_store(pages, question, entry=entry, **options), model.notes


def _find_entry(args: argparse.Namespace) -> tuple[pathlib.Path | None, pathlib.Path]:
    """Returns where the programs and weights of an earlier command may be, and the folder of the model."""
    from alignvlm_jax.backbones import trained_model
    from alignvlm_jax.inference import prepared

    cache, folder = getattr(args, "cache", None), trained_model(args.checkpoint)
    if cache is None or not is_local(folder) or not prepared.is_usable():
        return None, folder
    return prepared.entry_of(cache / "ask", pathlib.Path(folder), os.environ), folder
