"""`alignvlm import`: makes a checkpoint of two backbones, or of an exported folder."""

import argparse
import os

from alignvlm_jax.commands.arguments import Commands, positive
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import local_path, location, model_location, open_location
from alignvlm_jax.storage.errors import translated_errors

DESCRIPTION = """\
Make a checkpoint for training, of two backbones or of an AlignVLM folder. Neither torch
nor transformers is needed. The import needs as much memory as the converted weights.

--vision and --language join a SigLIP and a Llama by a fresh connector. Each is a folder in
Hugging Face layout, or a name on the Hub: ORG/NAME or ORG/NAME@REVISION. Weights must be
safetensors, in one file or in shards with an index. The vision folder may contain a
complete SigLIP or SigLIP 2 of fixed resolution, or only its vision model. The language
folder must contain a Llama 2 or 3, SmolLM2 or TinyLlama with its tokenizer.

--folder reads an AlignVLM folder. For one that `alignvlm export` wrote, this restores the
checkpoint: bit-identical weights, config, progress and history. A folder saved after
further training in PyTorch (`model.save_pretrained` and `processor.save_pretrained`) is
also read; its stages come from --config.
"""

EPILOG = """\
examples:
  alignvlm import --vision google/siglip-so400m-patch14-384 \\
      --language meta-llama/Llama-3.2-1B-Instruct --out runs/1b_start
  alignvlm train --config configs/alignvlm_1b.py --workdir runs/1b --init-from runs/1b_start
  alignvlm import --folder alignvlm-nano --out runs/back
  alignvlm import --folder nano --out start    # the trained model in the package

Backbones determine the shape of the model. The rest of the checkpoint's config (stages,
tiles, bins, compute precision) comes from --config. Without --config, it comes from the
shipped config for the same shapes (configs/debug_gpu.py for SigLIP-base/16 at 224 px with
SmolLM2-135M, configs/alignvlm_1b.py for So400m/14 at 384 px with Llama-3.2-1B, and so on).
If there is none, the stages are the paper's.

The config matters for `alignvlm ask` (tiles, precision) and for training in this folder.
`alignvlm train --config FILE --init-from OUT` takes the weights, their geometry and the
tokenizer from OUT, and everything else from FILE; tiles and bins only if FILE has none.
"""

_BACKBONES_ONLY = ("vision", "language", "connector", "image_token", "chat_template", "max_tiles")


def add(commands: Commands) -> None:
    """Adds the command."""
    summary = "make a checkpoint of two backbones, or of an exported folder"
    command = commands.add("import", run, summary, DESCRIPTION, EPILOG)
    command.add_argument(
        "--out", required=True, type=location, metavar="DIR", help="the checkpoint to create, a new folder"
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the stored weights (default: float32 for backbones, and that of the weights for --folder)",
    )
    command.add_argument(
        "--config",
        type=local_path,
        metavar="FILE",
        help="config with the stages, tiles and bins, see below; for --folder, the settings that a folder without "
        "alignvlm_training.json lacks (default: the paper's)",
    )
    command.add_argument(
        "--mesh",
        metavar="data=1,fsdp=1,tensor=1",
        help="distribute the weights over all devices during the import (default: build them on the host)",
    )
    backbones = command.add_argument_group("two backbones")
    backbones.add_argument(
        "--vision",
        type=model_location,
        metavar="DIR",
        help='a SigLIP folder, its name on the Hub, or "nano" for the shipped one',
    )
    backbones.add_argument(
        "--language",
        type=model_location,
        metavar="DIR",
        help='a Llama folder, its name on the Hub, or "nano" for the shipped one',
    )
    backbones.add_argument(
        "--connector",
        metavar="NAME",
        help="align, mlp, perceiver, ovis, h_reducer or c_abstractor (default: the config's connector)",
    )
    backbones.add_argument(
        "--image-token",
        metavar="TOKEN",
        help="token that stands for an image in the text (default: found in the vocabulary or added)",
    )
    backbones.add_argument(
        "--chat-template", type=location, metavar="FILE", help="a Jinja file that replaces the folder's chat template"
    )
    backbones.add_argument(
        "--max-tiles",
        type=positive,
        metavar="N",
        help="maximum number of tiles per page, without the thumbnail (default: the config's max_tiles)",
    )
    folder = command.add_argument_group("an AlignVLM folder")
    folder.add_argument(
        "--folder",
        type=model_location,
        metavar="DIR",
        help='the folder, its name on the Hub, or "nano" for the trained model in the package',
    )


def run(args: argparse.Namespace) -> None:
    """Imports two backbones or a folder, and prints the next command."""
    _check_source(args)
    if args.mesh is None:
        # The weights are built on the host. This has an effect only before JAX is imported.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.folder is None:
        _import_backbones(args)
    else:
        _import_folder(args)


def _check_source(args: argparse.Namespace) -> None:
    """Refuses options that do not belong together."""
    if args.folder is None:
        if args.vision is None or args.language is None:
            raise UserError("import: expected --vision and --language, or --folder")
        if args.dtype == "float16":
            raise UserError("--dtype float16 is for --folder; backbones are stored as float32 or bfloat16")
        return
    for name in _BACKBONES_ONLY:
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} cannot be used with --folder, which contains the complete model")


def _import_backbones(args: argparse.Namespace) -> None:
    from alignvlm_jax.interop.import_hf import import_huggingface
    from alignvlm_jax.parallel.mesh import parse_mesh

    template = None if args.chat_template is None else _read(args.chat_template)
    config = import_huggingface(
        args.vision,
        args.language,
        args.out,
        connector=args.connector,
        dtype=args.dtype or "float32",
        mesh=None if args.mesh is None else parse_mesh(args.mesh),
        config_file=args.config,
        image_token=args.image_token,
        chat_template=template,
        max_tiles=args.max_tiles,
    )
    tiling = config.data.tiling
    tiles = f"up to {tiling.max_tiles} tiles of {tiling.tile_size} px per page"
    print(f"{args.out}: {tiles}. Train its connector, before you ask or export it:")
    command = f"alignvlm train --config {args.config or 'FILE'} --workdir NEW --init-from {args.out}"
    print(f"  {command}")


def _import_folder(args: argparse.Namespace) -> None:
    from alignvlm_jax.backbones import trained_model
    from alignvlm_jax.interop.import_pytorch import import_alignvlm
    from alignvlm_jax.interop.start import load_config
    from alignvlm_jax.parallel.mesh import make_mesh, parse_mesh

    mesh = None if args.mesh is None else make_mesh(parse_mesh(args.mesh))
    base = load_config(args.config) if args.config else None
    import_alignvlm(trained_model(args.folder), args.out, dtype=args.dtype, mesh=mesh, base=base)
    print(f"{args.out}: ask, evaluate, export or train it:")
    command = f"alignvlm train --config configs/finetune.py --workdir NEW --init-from {args.out}"
    print(f"  {command} --config.dataset=DATA")


def _read(path: str) -> str:
    try:
        with translated_errors(path):
            return open_location(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
