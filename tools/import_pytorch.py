#!/usr/bin/env python3
"""Reads a PyTorch AlignVLM folder back into a checkpoint that can be trained, asked, scored and exported.

    tools/import_pytorch.py --folder alignvlm-nano --out runs/back

What `tools/export_pytorch.py` wrote comes back bit by bit, with its config, progress and history. A folder that PyTorch
saved after training there (`model.save_pretrained` and `processor.save_pretrained`) is read too; its stages are then
those of --config.
"""

import argparse
import os
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="the PyTorch folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the checkpoint to make; a new folder")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the stored weights (default: as in the folder)"
    )
    parser.add_argument(
        "--mesh",
        metavar="data=1,fsdp=1,tensor=1",
        help="spread the weights over all devices so on their way; without it they are put together on the host",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="what a folder without alignvlm_training.json does not say, such as stages (default: the paper's)",
    )
    args = parser.parse_args()
    if args.mesh is None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Imported here, so that --help answers at once, and jax sees the variable above.
    from alignvlm_jax.config.loading import load_config
    from alignvlm_jax.errors import UserError
    from alignvlm_jax.interop.import_pytorch import import_alignvlm
    from alignvlm_jax.parallel.mesh import make_mesh, parse_mesh

    try:
        mesh = None if args.mesh is None else make_mesh(parse_mesh(args.mesh))
        base = load_config(args.config) if args.config else None
        import_alignvlm(args.folder, args.out, dtype=args.dtype, mesh=mesh, base=base)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.out}: ask it, score it, export it, or train from it:")
    print(f"  alignvlm train --config FILE --workdir NEW --init-from {args.out}")


if __name__ == "__main__":
    main()
