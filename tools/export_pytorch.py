#!/usr/bin/env python3
"""Exports a checkpoint as a folder for PyTorch (transformers 5).

    tools/export_pytorch.py --checkpoint runs/demo/checkpoint --out alignvlm-nano --dtype bfloat16 --verify
    tools/export_pytorch.py --checkpoint runs/demo/checkpoint --out llama-nano --language-only
    tools/export_pytorch.py --checkpoint runs/demo/checkpoint --out siglip-nano --vision-only

The export needs no torch, no transformers and no accelerator. Without --dtype, every weight keeps its dtype, and
`tools/import_pytorch.py` restores a bit-identical checkpoint. For serving, use --dtype bfloat16.

--verify answers a question about one page with the checkpoint in JAX and with the exported folder in PyTorch, both in
float32 on the CPU, and prints both answers and the largest difference of their logits. If they differ, the exit code is
3; the folder stays. This needs torch, transformers 5, and memory for the model in float32: 11 GB for 1B, 40 GB for 8B.
"""

import argparse
import os
import re
import sys

from alignvlm_jax.commands.program import run_program
from alignvlm_jax.locations import as_path, local_path

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main() -> int:
    """Runs the export and returns the exit code."""
    return run_program("export_pytorch", lambda: run(parse()))


def parse() -> argparse.Namespace:
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=local_path, required=True, help="the workdir of a training run, or one of its step folders"
    )
    parser.add_argument(
        "--out", type=as_path, required=True, help="the folder to create; must be empty or not exist yet"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: as in the checkpoint)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="maximum size of a file of weights (default: 5GB); the export needs memory for one file and one matrix",
    )
    parser.add_argument("--verify", action="store_true", help="compare the folder with the checkpoint on one page")
    parser.add_argument(
        "--verify-image", type=as_path, metavar="FILE", help="the page for --verify (default: a drawn page of the demo)"
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--language-only", action="store_true", help="write only the decoder, as a plain Llama folder")
    part.add_argument("--vision-only", action="store_true", help="write only the encoder, as a plain SigLIP folder")
    args = parser.parse_args()
    args.verify = args.verify or args.verify_image is not None
    if args.verify and (args.language_only or args.vision_only):
        parser.error("--verify compares the complete model: omit --language-only and --vision-only")
    return args


def run(args: argparse.Namespace) -> int:
    """Exports the checkpoint, compares both if asked to, and returns the exit code."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Import late, so that --help is fast and JAX reads the variable above.
    from alignvlm_jax.inference import verification
    from alignvlm_jax.interop import export

    write = export.export_alignvlm
    if args.language_only:
        write = export.export_language
    if args.vision_only:
        write = export.export_vision
    if args.verify:
        # Before the export, which may take minutes.
        verification.check_packages()
        verification.read_page(args.verify_image)
    write(args.checkpoint, args.out, dtype=args.dtype, max_shard_bytes=args.max_shard_size)
    print(f"{args.out}: {sum(file.stat().st_size for file in args.out.iterdir()) / 1e6:,.1f} MB")
    if args.verify:
        comparison = verification.verify_export(
            args.checkpoint,
            args.out,
            dtype=args.dtype,
            image=args.verify_image,
            on_side=lambda side: print(f"verifying: {side} ...", file=sys.stderr, flush=True),
        )
        print(comparison.describe())
        return 3 if comparison.problems else 0
    return 0


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|)", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 2GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


if __name__ == "__main__":
    sys.exit(main())
