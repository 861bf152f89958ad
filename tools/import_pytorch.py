#!/usr/bin/env python3
"""Reads a PyTorch AlignVLM folder back into a checkpoint that can be trained, asked, scored and exported.

    tools/import_pytorch.py --folder alignvlm-nano --out runs/back

What `tools/export_pytorch.py` wrote comes back bit by bit, with its config, progress and history. A folder that PyTorch
saved after training there (`model.save_pretrained` and `processor.save_pretrained`) is read too; its stages are then
those of --config.
"""

import argparse
import sys
from pathlib import Path

from alignvlm_jax import config as configs
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop.import_pytorch import DEFAULT_CONFIG, import_alignvlm
from alignvlm_jax.interop.tensor_writer import DTYPES
from alignvlm_jax.parallel.mesh import AXES, MeshConfig, make_mesh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the PyTorch folder")
    parser.add_argument("--out", type=Path, required=True, help="the workdir to make; it must not exist, or be empty")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; without it they stay as they are")
    parser.add_argument(
        "--mesh", metavar="SIZES", help='devices to spread the weights over on their way, such as "fsdp=8"'
    )
    parser.add_argument(
        "--config",
        help=f"what a folder without alignvlm_training.json does not say, such as stages; default {DEFAULT_CONFIG}",
    )
    args = parser.parse_args()
    try:
        mesh = make_mesh(_mesh_config(args.mesh)) if args.mesh else None
        base = configs.load(args.config) if args.config else None
        import_alignvlm(args.folder, args.out, dtype=args.dtype, mesh=mesh, base=base)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.out}: a checkpoint")


def _mesh_config(text: str) -> MeshConfig:
    sizes = {}
    for part in text.replace(",", " ").split():
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.removeprefix("-").isdigit():
            raise UserError(f"--mesh {text!r}: expected sizes of {', '.join(AXES)}, such as 'fsdp=4,tensor=2'")
        sizes[axis] = int(size)
    try:
        return MeshConfig(**{"data": 1, **sizes})
    except ValueError as error:
        raise UserError(f"--mesh {text!r}: {error}") from error


if __name__ == "__main__":
    main()
