"""The paper's low-resource comparison: the 3B model with any connector, trained on LLaVA's data in two stages.

    alignvlm train --config configs/low_resource_3b.py --workdir runs/low_align
    ... --config.model.connector=mlp | ovis | h_reducer | c_abstractor     # the other rows of the table
    ... --config.model.connector=perceiver --config.data.tiling.rule=ovis

anyres_max_9 joins tiles by the positions of their tokens on the page. A Perceiver's tokens have no positions, so its
row keeps the tiles separate. The paper does not say how it joined them.

Source: arXiv 2502.01341. Data (LLaVA-558K, then LLaVA-NeXT-779K, one epoch each), trained parts, learning rates and the
tiling rule are the paper's. It does not state batch sizes and warm-up. This config uses LLaVA-NeXT's: 256 and 128, and
a cosine decay to 0 after a warm-up of 3 % of the steps. Convert the data with `alignvlm prepare --format llava`.
"""

from ml_collections import ConfigDict

from alignvlm_jax.config import read_config_file


def get_config() -> ConfigDict:
    """Returns the config of the experiment."""
    config = read_config_file("configs/alignvlm_3b.py")
    config.data.tiling = ConfigDict(dict(rule="anyres_max_9", max_tiles=9, thumbnail=True))
    # An image has up to 36 cells and the page as a whole: 37 tiles, and up to 8,829 visual tokens after reduction.
    config.data.packing = ConfigDict(
        dict(tokens_per_bin=14848, tiles_per_bin=40, bins_per_microbatch=64, examples_per_bin=32)
    )
    config.stages = [
        stage("captions", "llava_558k", trainable=("connector",), batch=256, warmup_steps=65, connector=1e-3),
        stage(
            "instructions",
            "llava_next_779k",
            trainable=("vision", "connector", "language"),
            batch=128,
            warmup_steps=183,
            connector=1e-5,
            language=1e-5,
            vision=2e-6,
        ),
    ]
    return config


def stage(
    name: str, dataset: str, trainable: tuple[str, ...], batch: int, warmup_steps: int, **learning_rates: float
) -> ConfigDict:
    """Returns a stage with one epoch of one data set and a learning rate for each trained part."""
    return ConfigDict(
        dict(
            name=name,
            trainable=trainable,
            mixture=[dict(dataset=dataset, split="train", task="conversation", weight=1.0)],
            epochs=1.0,
            global_batch=batch,
            learning_rates=learning_rates,
            schedule="cosine",
            warmup_steps=warmup_steps,
            optimizer=dict(name="adamw", weight_decay=0.0, clip_norm=1.0),
            max_text_tokens=2048,
        )
    )
