#!/usr/bin/env python3
"""Joins a SigLIP folder and a Llama folder in Hugging Face layout into a checkpoint of an untrained AlignVLM.

    tools/import_hf.py --vision siglip-so400m-patch14-384 --language Llama-3.2-1B-Instruct --out runs/1b_start
    alignvlm train --config configs/alignvlm_1b.py --workdir runs/1b --init-from runs/1b_start

Weights must be safetensors, in one file or in shards with an index. The vision folder may contain a complete SigLIP or
SigLIP 2 of fixed resolution, or only its vision model. The language folder must contain a Llama 2 or 3, SmolLM2 or
TinyLlama with its tokenizer. Neither torch nor transformers is needed. The import needs as much memory as the converted
weights.

The folders determine the shape of the model. The rest of the checkpoint's config (stages, tiles, bins, compute
precision) comes from --config. Without --config, it comes from the shipped config for the same shapes
(configs/debug_gpu.py for SigLIP-base/16 at 224 px with SmolLM2-135M, configs/alignvlm_1b.py for So400m/14 at 384 px
with Llama-3.2-1B, and so on). If there is none, the stages are the paper's.

The config matters for `alignvlm ask` (tiles, precision) and for training in this workdir. `alignvlm train --config FILE
--init-from CHECKPOINT` takes only the weights and the tokenizer from the checkpoint, and everything else from FILE.
"""

import argparse
import os
import sys
from pathlib import Path

from alignvlm_jax.commands.arguments import positive
from alignvlm_jax.commands.program import run_program
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import as_path, local_path


def main() -> int:
    """Runs the import and returns the exit code."""
    return run_program("import_hf", lambda: run(parse()))


def parse() -> argparse.Namespace:
    """Returns the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--vision", required=True, type=local_path, metavar="DIR", help='a SigLIP folder, or "nano" for the shipped one'
    )
    parser.add_argument(
        "--language",
        required=True,
        type=local_path,
        metavar="DIR",
        help='a Llama folder, or "nano" for the shipped one',
    )
    parser.add_argument(
        "--connector",
        metavar="NAME",
        help="align, mlp, perceiver, ovis, h_reducer or c_abstractor (default: the config's connector)",
    )
    parser.add_argument(
        "--out", required=True, type=as_path, metavar="DIR", help="the checkpoint to create, a new folder"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the stored weights (default: float32)",
    )
    parser.add_argument(
        "--config", type=local_path, metavar="FILE", help="config with the stages, tiles and bins; see above"
    )
    parser.add_argument(
        "--mesh",
        metavar="data=1,fsdp=1,tensor=1",
        help="distribute the weights over all devices during the import (default: build them on the host)",
    )
    parser.add_argument(
        "--image-token",
        metavar="TOKEN",
        help="token that stands for an image in the text (default: found in the vocabulary or added)",
    )
    parser.add_argument(
        "--chat-template", type=as_path, metavar="FILE", help="a Jinja file that replaces the folder's chat template"
    )
    parser.add_argument(
        "--max-tiles",
        type=positive,
        metavar="N",
        help="maximum number of tiles per page, without the thumbnail (default: the config's max_tiles)",
    )
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Imports the folders and prints the next command."""
    if args.mesh is None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Import late, so that --help is fast and JAX reads the variable above.
    from alignvlm_jax.interop.import_hf import import_huggingface
    from alignvlm_jax.parallel.mesh import parse_mesh

    template = None if args.chat_template is None else _read(args.chat_template)
    config = import_huggingface(
        args.vision,
        args.language,
        args.out,
        connector=args.connector,
        dtype=args.dtype,
        mesh=None if args.mesh is None else parse_mesh(args.mesh),
        config_file=args.config,
        image_token=args.image_token,
        chat_template=template,
        max_tiles=args.max_tiles,
    )
    tiling, model = config.data.tiling, config.model
    tiles = f"up to {tiling.max_tiles} tiles of {tiling.tile_size} px per page"
    print(f"{args.out}: {tiles}. Train its connector, before you ask or export it:")
    command = f"alignvlm train --config {args.config or 'FILE'} --workdir NEW --init-from {args.out}"
    words = getattr(model.connector, "vocab_size", None)
    if words is not None:
        # Tokens were added to the embedding table. A config for the original folders has the old size.
        command += f" --config.model.language.vocab_size={model.language.vocab_size}"
        command += f" --config.model.connector.vocab_size={words}"
    print(f"  {command}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
