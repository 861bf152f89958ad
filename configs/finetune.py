r"""Fine-tunes a checkpoint on one data set from `alignvlm prepare`.

    alignvlm train --config configs/finetune.py --workdir runs/tags --init-from start --config.dataset=data/tags

The model, how it cuts pages, and the size of its bins come from the checkpoint. `--config.NAME=VALUE` sets a parameter
of `get_config` below, or any other key: `--config.stages.0.trainable=connector`. To mix data sets, write a config that
starts with `config = read_config_file("configs/finetune.py", init_from="start", dataset="data/tags")`.
"""

from ml_collections import ConfigDict

from alignvlm_jax.errors import UserError


def get_config(
    init_from: str,
    dataset: str,
    split: str = "train",
    steps: int = 300,
    batch: int = 16,
    learning_rate: float = 2e-5,
    held_out: int = 5,
) -> ConfigDict:
    """Returns the config of the run.

    Args:
      init_from: the checkpoint to start from.
      dataset: folder of the data set.
      split: split of the data set.
      steps: number of optimizer steps.
      batch: number of examples per step, rounded to whole microbatches of 8 bins.
      learning_rate: peak rate. The paper has 5e-5 for 1B and 3B and 1e-5 for 8B in its last stage; a small model takes
        a larger one.
      held_out: percentage of the split that is kept out of the training. The run scores questions from it five times.
        0 trains on everything.
    """
    root, slash, name = dataset.rstrip("/").rpartition("/")
    config = ConfigDict(dict(init_from=init_from, log_every_steps=10))
    # The least recomputation that fits in memory.
    config.model = ConfigDict(dict(vision=dict(remat="auto"), language=dict(remat="auto")))
    # Bins are divided among the devices, so 8 of them suit 1, 2, 4 and 8 devices.
    config.data = ConfigDict(dict(root=root or slash or ".", packing=dict(bins_per_microbatch=8)))
    config.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
    config.checkpoint = ConfigDict(dict(every_steps=max(1, steps // 5), keep=2))
    trained = split
    if held_out:
        if "[" in split or "+" in split:
            raise UserError(f"config.held_out: expected 0 with a part of a split, {split}, got {held_out}")
        trained, scored = f"{split}[:{100 - held_out}%]", f"{split}[{100 - held_out}%:]"
        config.evaluation = ConfigDict(dict(dataset=name, split=scored, every_steps=max(1, steps // 5)))
    config.stages = [
        ConfigDict(
            dict(
                name="finetune",
                mixture=[dict(dataset=name, split=trained, task="conversation")],
                trainable=("vision", "connector", "language"),
                steps=steps,
                global_batch=batch,
                learning_rates=dict(vision=learning_rate, connector=learning_rate, language=learning_rate),
                schedule="cosine",
                warmup_steps=min(100, steps // 10),
                optimizer=dict(name="adamw", weight_decay=0.0, clip_norm=1.0),
            )
        )
    ]
    return config
