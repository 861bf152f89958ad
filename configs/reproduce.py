"""Recipe of the comparison of connectors: all get the same steps and pages, and none has an advantage.

    alignvlm reproduce --out runs/reproduce                                      # all connectors, seeds and parts
    alignvlm train --config configs/reproduce.py --workdir runs/mlp --config.model.connector=mlp      # one run of it

There are two stages. The model first transcribes pages, until the connector works; then it transcribes pages and
answers questions. A bin holds one page, so every connector sees the same pages in the same step, regardless of
its number of visual tokens per page (`reproduce/recipe.py` sets the size of the bin accordingly). The connector's
learning rate is tuned over the same grid for all connectors; the ratio of the rates of the two stages is fixed.
"""

from ml_collections import ConfigDict

from alignvlm_jax.config import read_config_file

STEPS = {"align": 150, "read": 150}
PAGES = 8  # per step


def get_config() -> ConfigDict:
    """Returns the config of the experiment."""
    config = read_config_file("configs/nano.py")
    config.data.packing = ConfigDict(
        dict(tokens_per_bin=200 + 96, tiles_per_bin=2, bins_per_microbatch=PAGES, examples_per_bin=1, window=1)
    )
    config.stages = [
        stage("align", task="transcribe", steps=STEPS["align"], connector=4e-3, others=2e-4),
        stage("read", task="mixed", steps=STEPS["read"], connector=2e-3, others=6e-4),
    ]
    config.checkpoint = ConfigDict(dict(every_steps=100, keep=1))
    config.log_every_steps = 25
    return config


def stage(name: str, task: str, steps: int, connector: float, others: float) -> ConfigDict:
    """Returns a stage that trains all parts; `connector` and `others` are peak learning rates."""
    return ConfigDict(
        dict(
            name=name,
            trainable=("vision", "connector", "language"),
            mixture=[dict(dataset="documents", split="train", task=task, weight=1.0)],
            steps=steps,
            global_batch=PAGES,
            bins_per_step=PAGES,
            learning_rates=dict(vision=others, connector=connector, language=others),
            schedule="cosine",
            warmup_steps=10,
            final_lr_fraction=0.1,
            optimizer=dict(name="muon", weight_decay=0.01, clip_norm=1.0),
            max_text_tokens=96,
        )
    )
