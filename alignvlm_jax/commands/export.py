"""`alignvlm export`: writes a checkpoint as a folder for PyTorch."""

import argparse
import os
import pathlib
import re
import sys

from alignvlm_jax.commands.arguments import Commands
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import is_bucket, location

DESCRIPTION = """\
Export a checkpoint as a folder for PyTorch (transformers 5). The export needs no torch, no
transformers and no accelerator. Without --dtype, every weight keeps its dtype, and
`alignvlm import --folder` restores a bit-identical checkpoint. For serving, use
--dtype bfloat16.
"""

EPILOG = """\
examples:
  alignvlm export --checkpoint runs/demo/checkpoint --out alignvlm-nano --dtype bfloat16 --verify
  alignvlm export --checkpoint runs/demo/checkpoint --out llama-nano --language-only
  alignvlm export --checkpoint runs/demo/checkpoint --out siglip-nano --vision-only
  alignvlm export --checkpoint runs/1b --out alignvlm-1b --dtype bfloat16 --push-to-hub ORG/NAME

--verify answers a question about one page with the checkpoint in JAX and with the exported
folder in PyTorch, both in float32 on the CPU, and prints both answers and the largest
difference of their logits. If they differ, the exit code is 3; the folder stays. This
needs torch, transformers 5, and memory for the model in float32: 11 GB for 1B, 40 GB for
8B.
"""

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_DIFFERS = 3


def add(commands: Commands) -> None:
    """Adds the command."""
    summary = "write a checkpoint as a folder for PyTorch"
    command = commands.add("export", run, summary, DESCRIPTION, EPILOG)
    command.add_argument(
        "--checkpoint",
        type=location,
        required=True,
        metavar="DIR",
        help="folder of a training run, or one of its step folders",
    )
    command.add_argument(
        "--out",
        type=location,
        required=True,
        metavar="DIR",
        help="the folder to create; must be empty or not exist yet",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: as in the checkpoint)",
    )
    command.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="maximum size of a file of weights (default: 5GB); the export needs memory for one file and one matrix",
    )
    command.add_argument("--verify", action="store_true", help="compare the folder with the checkpoint on one page")
    command.add_argument(
        "--verify-image",
        type=location,
        metavar="FILE",
        help="the page for --verify (default: a drawn page of the demo)",
    )
    part = command.add_mutually_exclusive_group()
    part.add_argument("--language-only", action="store_true", help="write only the decoder, as a plain Llama folder")
    part.add_argument("--vision-only", action="store_true", help="write only the encoder, as a plain SigLIP folder")
    command.add_argument(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="upload the folder with its model card to the Hugging Face Hub, as a private repository",
    )
    command.add_argument("--public", action="store_true", help="with --push-to-hub, make a new repository public")


def run(args: argparse.Namespace) -> int:
    """Exports the checkpoint, compares both if asked to, and returns the exit code."""
    verifies = args.verify or args.verify_image is not None
    if verifies and (args.language_only or args.vision_only):
        raise UserError("--verify compares the complete model: omit --language-only and --vision-only")
    if args.public and not args.push_to_hub:
        raise UserError("--public is for --push-to-hub")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # has an effect only before JAX is imported
    from alignvlm_jax.checkpoints.workdir import find_checkpoint
    from alignvlm_jax.downloads import hub_upload
    from alignvlm_jax.inference import verification
    from alignvlm_jax.interop import export
    from alignvlm_jax.storage.transfer import folder_size

    write = export.export_alignvlm
    if args.language_only:
        write = export.export_language
    if args.vision_only:
        write = export.export_vision
    if verifies:
        # Before the export, which may take minutes.
        verification.check_packages()
        verification.read_page(args.verify_image)
    repository = None
    if args.push_to_hub:
        # The token, too, is checked before the export. Nothing is created for a checkpoint that does not exist.
        find_checkpoint(args.checkpoint)
        if is_bucket(args.out):
            raise UserError(f"--push-to-hub uploads a folder on a disk, but --out is {args.out}")
        repository = hub_upload.prepare_upload(args.push_to_hub, is_public=args.public)
    write(args.checkpoint, args.out, dtype=args.dtype, max_shard_bytes=args.max_shard_size)
    print(f"{args.out}: {folder_size(args.out) / 1e6:,.1f} MB")
    if verifies:
        comparison = verification.verify_export(
            args.checkpoint,
            args.out,
            dtype=args.dtype,
            image=args.verify_image,
            on_side=lambda side: print(f"verifying: {side} ...", file=sys.stderr, flush=True),
        )
        print(comparison.describe())
        if comparison.problems:
            return _DIFFERS
    if repository is not None:
        print(hub_upload.upload(repository, pathlib.Path(args.out)))
        print(f"Ask it with:\n  alignvlm ask --checkpoint {repository.name} page.png --question '...'")
    return 0


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|)", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 2GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
