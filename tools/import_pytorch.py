#!/usr/bin/env python3
"""Imports a PyTorch AlignVLM folder as a checkpoint for inference, evaluation, training and export.

    tools/import_pytorch.py --folder alignvlm-nano --out runs/back

Importing a folder that `tools/export_pytorch.py` wrote restores the checkpoint: bit-identical weights, config, progress
and history. Folders saved after further training in PyTorch (`model.save_pretrained` and `processor.save_pretrained`)
can also be imported; their stages then come from --config.
"""

import argparse
import os
import sys

from alignvlm_jax.commands.program import run_program
from alignvlm_jax.locations import as_path, local_path


def main() -> int:
    """Runs the import and returns the exit code."""
    return run_program("import_pytorch", lambda: run(parse()))


def parse() -> argparse.Namespace:
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=as_path, required=True, metavar="DIR", help="the PyTorch folder")
    parser.add_argument(
        "--out", type=as_path, required=True, metavar="DIR", help="the checkpoint to create, a new folder"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the stored weights (default: as in the folder)",
    )
    parser.add_argument(
        "--mesh",
        metavar="data=1,fsdp=1,tensor=1",
        help="distribute the weights over all devices during the import (default: build them on the host)",
    )
    parser.add_argument(
        "--config",
        type=local_path,
        metavar="FILE",
        help="config with the settings that a folder without alignvlm_training.json lacks (default: the paper's)",
    )
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Imports the folder and prints the next command."""
    if args.mesh is None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Import late, so that --help is fast and JAX reads the variable above.
    from alignvlm_jax.config.loading import load_config
    from alignvlm_jax.interop.import_pytorch import import_alignvlm
    from alignvlm_jax.parallel.mesh import make_mesh, parse_mesh

    mesh = None if args.mesh is None else make_mesh(parse_mesh(args.mesh))
    base = load_config(args.config) if args.config else None
    import_alignvlm(args.folder, args.out, dtype=args.dtype, mesh=mesh, base=base)
    print(f"{args.out}: ask, evaluate, export or train it:")
    print(f"  alignvlm train --config FILE --workdir NEW --init-from {args.out}")


if __name__ == "__main__":
    sys.exit(main())
