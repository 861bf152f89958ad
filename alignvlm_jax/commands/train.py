"""`alignvlm train`: trains a model through the stages of a config file."""

import argparse

from alignvlm_jax.commands.arguments import Commands, add_distributed, distributed_run, name_list
from alignvlm_jax.locations import is_bucket, local_path, location, open_location

DESCRIPTION = """\
Train a model through the stages of a config file. A stage sets the trainable parts, the
data, the number of steps and the learning rates. At the start of each stage, a table
lists the parts of the model, their sizes, and whether they are trained or frozen.

Run the same command again to resume from the last checkpoint in WORKDIR, with the data
in the same order.
"""

EPILOG = """\
examples:
  alignvlm train --config configs/nano.py --workdir runs/first
  alignvlm train --config configs/nano.py --workdir runs/seed1 --config.seed=1
  alignvlm train --config configs/nano.py --workdir runs/mlp --config.model.connector=mlp
  alignvlm train --config configs/nano.py --workdir runs/more --init-from runs/first
  alignvlm train --config configs/finetune.py --workdir runs/tags --init-from start --config.dataset=data/tags
  alignvlm train --config configs/nano.py --workdir runs/scored --config.evaluation.every_steps=100

--config.path.to.key=value sets any field of the config. An unknown name is an error that
suggests the closest valid one. A path such as configs/nano.py is looked up in the
current folder first, and then among the configs in the package.

The run writes config.json, tokenizer/, checkpoints and TensorBoard event files to
WORKDIR (`pip install tensorboard`, `tensorboard --logdir WORKDIR`). Pass WORKDIR to
`eval` and `ask` as --checkpoint. --log-to sends the same curves to other trackers:

  alignvlm train --config configs/nano.py --workdir runs/first --log-to tensorboard,wandb \
      --config.evaluation.log_answers_every_steps=100
"""


def add(commands: Commands) -> None:
    """Adds the `train` command."""
    summary = "train a model through the stages of a config"
    command = commands.add("train", run, summary, DESCRIPTION, EPILOG, takes_overrides=True)
    command.add_argument(
        "--config", required=True, type=local_path, metavar="FILE", help="config file, such as configs/nano.py"
    )
    command.add_argument(
        "--workdir", required=True, type=location, metavar="DIR", help="folder of the run; resumed if it exists"
    )
    command.add_argument(
        "--allow-config-change",
        type=lambda text: [key.strip().removeprefix("config.") for key in text.split(",") if key.strip()],
        default=[],
        metavar="KEY[,KEY]",
        help="resume even if these keys of the config, which change the computation, have new values",
    )
    command.add_argument(
        "--init-from",
        type=location,
        metavar="CHECKPOINT",
        help="start from the weights and the tokenizer of this checkpoint instead of the backbones (same as "
        "--config.init_from)",
    )
    command.add_argument(
        "--log-to",
        type=name_list,
        default=("tensorboard",),
        metavar="NAME[,NAME]",
        help="trackers of curves and answers: tensorboard, wandb, trackio, or none (default: tensorboard)",
    )
    add_distributed(command)


def run(args: argparse.Namespace) -> None:
    """Trains a model, or resumes a run."""
    from alignvlm_jax import demo
    from alignvlm_jax.evaluation.during_training import answers_during_training, during_training
    from alignvlm_jax.interop.start import load_config
    from alignvlm_jax.parallel import distributed
    from alignvlm_jax.parallel.writing import call_in_primary
    from alignvlm_jax.storage.access import check_writable
    from alignvlm_jax.training import loop
    from alignvlm_jax.training.pinning import pin_sources
    from alignvlm_jax.training.tracking.trackers import check_trackers

    log_to = () if args.log_to == ("none",) else args.log_to
    check_trackers(log_to)
    if args.init_from:
        args.overrides.append(f"init_from={args.init_from}")
    experiment = load_config(args.config, args.overrides)
    with distributed_run(args):
        if is_bucket(args.workdir):
            # Now, because drawing a corpus takes minutes.
            call_in_primary(lambda: check_writable(args.workdir))
        if distributed.is_primary():
            demo.draw_missing_corpus(experiment)
        experiment = pin_sources(experiment, open_location(args.workdir))
        # Barrier: the other processes wait until the primary one has generated the corpus, which all of them read.
        distributed.gather_json("drawn")
        progress = loop.train(
            experiment,
            args.workdir,
            score=during_training(experiment),
            answer=answers_during_training(experiment),
            log_to=log_to,
            allow_config_change=args.allow_config_change,
        ).progress
        if distributed.is_primary():
            print(f"trained {progress.step} steps in {progress.train_seconds:.0f} s. Score the model with:")
            print(f"  alignvlm eval --checkpoint {args.workdir}")
