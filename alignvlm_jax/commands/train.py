"""`alignvlm train`."""

import argparse
import pathlib

from alignvlm_jax.commands.arguments import Commands, joined

DESCRIPTION = """\
Train a model through the stages of a config file. A stage says what is trainable, on
which data, for how long and how fast. Before each stage a table of the parts of the
model shows how many parameters each has and whether it is trained or frozen.

The same command again resumes where it stopped: from the last checkpoint in WORKDIR,
with the data in the same order.
"""

EPILOG = """\
examples:
  alignvlm train --config configs/nano.py --workdir runs/first
  alignvlm train --config configs/nano.py --workdir runs/seed1 --config.seed=1
  alignvlm train --config configs/nano.py --workdir runs/mlp --config.model.connector=mlp
  alignvlm train --config configs/nano.py --workdir runs/more --init-from runs/first
  alignvlm train --config configs/nano.py --workdir runs/scored --config.evaluation.every_steps=100

Any field of the config can be set with --config.path.to.key=value; a name that does not
exist is refused with the nearest right one. `configs/nano.py` is looked for here first,
then among the configs shipped with the package.

WORKDIR then holds config.json, tokenizer/, the checkpoints and TensorBoard event files
(`pip install tensorboard`, `tensorboard --logdir WORKDIR`); it is what --checkpoint of `eval` and `ask` wants.
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    summary = "train through the stages of a config"
    command = commands.add("train", run, summary, DESCRIPTION, EPILOG, takes_overrides=True, distributed=True)
    command.add_argument("--config", required=True, metavar="FILE", help="the experiment, such as configs/nano.py")
    command.add_argument("--workdir", required=True, metavar="DIR", help="where everything goes; resumed if it exists")
    command.add_argument(
        "--allow-config-change",
        type=lambda text: [key.strip().removeprefix("config.") for key in text.split(",") if key.strip()],
        default=[],
        metavar="KEY[,KEY]",
        help="resume although these keys of the config, which change what is computed, are not what they were",
    )
    command.add_argument(
        "--init-from",
        metavar="CHECKPOINT",
        help="start with this checkpoint's weights and tokenizer, not with the backbones (same as --config.init_from)",
    )


def run(args: argparse.Namespace) -> None:
    """Trains, or goes on where the same command stopped."""
    from alignvlm_jax import demo
    from alignvlm_jax.config.loading import load_config
    from alignvlm_jax.evaluation.during_training import during_training
    from alignvlm_jax.parallel import distributed
    from alignvlm_jax.training import loop

    if args.init_from:
        args.overrides.append(f"init_from={args.init_from}")
    experiment = load_config(args.config, args.overrides)
    with joined(args):
        if distributed.is_primary():
            demo.draw_missing_corpus(experiment)
        distributed.gather_json("drawn")
        progress = loop.train(
            experiment,
            pathlib.Path(args.workdir),
            score=during_training(experiment),
            allow_config_change=args.allow_config_change,
        ).progress
        if distributed.is_primary():
            print(f"trained {progress.step} steps in {progress.train_seconds:.0f} s; score it with:")
            print(f"  alignvlm eval --checkpoint {args.workdir}")
