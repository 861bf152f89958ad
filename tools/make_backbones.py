#!/usr/bin/env python3
"""Trains the nano backbones from scratch (`make backbones`).

    tools/make_backbones.py                       both, one after the other
    tools/make_backbones.py --only vision         one of them; the two can run in parallel, on one core each
    tools/make_backbones.py --only vision --objective transcription --out /tmp/vision_transcription
                                                  an encoder trained without a label for each patch

Run the same command again to resume from the last checkpoint in --workdir. Progress and scores are printed. The scores
are also written to `scores.json` in the folder of each backbone's checkpoints.
"""

import argparse
import json
from pathlib import Path

from alignvlm_jax.locations import as_path
from alignvlm_jax.pretraining.language_recipe import make_language_backbone
from alignvlm_jax.pretraining.training import PretrainConfig
from alignvlm_jax.pretraining.vision_recipe import OBJECTIVES, make_vision_backbone

VISION = PretrainConfig(steps=5500)
LANGUAGE = PretrainConfig(steps=4000, batch_size=8)


def main() -> None:
    """Trains the selected backbones and reports their scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("vision", "language"), help="train one of the two (default: both)")
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="patches",
        help="training objective of the encoder (default: patches)",
    )
    parser.add_argument(
        "--out",
        type=as_path,
        default=Path("alignvlm_jax/backbones/nano"),
        help="output folder (default: alignvlm_jax/backbones/nano)",
    )
    parser.add_argument(
        "--workdir",
        type=as_path,
        default=Path("runs/backbones"),
        help="folder of checkpoints, to resume from (default: runs/backbones)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        help=f"number of optimizer steps (default: {VISION.steps} for vision, {LANGUAGE.steps} for language)",
    )
    args = parser.parse_args()

    def configure(config: PretrainConfig) -> PretrainConfig:
        return config if args.steps is None else PretrainConfig(steps=args.steps)

    if args.only != "language":
        workdir = args.workdir / f"vision_{args.objective}"
        scores = make_vision_backbone(args.out / "vision", workdir, configure(VISION), args.objective)
        report("vision", scores, workdir)
    if args.only != "vision":
        workdir = args.workdir / "language"
        scores = make_language_backbone(args.out / "language", workdir, configure(LANGUAGE))
        report("language", scores, workdir)


def report(name: str, scores: dict[str, float], workdir: Path) -> None:
    """Prints a backbone's scores on validation pages and writes them to its folder of checkpoints."""
    (workdir / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores.items()))


if __name__ == "__main__":
    main()
