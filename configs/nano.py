"""Small AlignVLM, which two CPU cores train in ten minutes: the nano backbones joined by ALIGN.

    alignvlm demo                                                       # draws the documents, trains, scores
    alignvlm train --config configs/nano.py --workdir runs/nano         # draws missing documents, trains

The stages are the paper's: the full model on captions (here: transcribing pages), the full model on documents (here:
both tasks), then the language model and the connector on document tasks (here: questions), with the vision encoder
frozen. Encoder and decoder have the shapes of the shipped nano backbones.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config of the experiment."""
    config = ConfigDict()
    config.seed = 0
    config.backbones = ConfigDict(dict(vision="nano", language="nano"))
    config.model = ConfigDict()
    config.model.vision = ConfigDict(
        dict(image_size=80, patch_size=8, hidden_size=128, intermediate_size=512, num_layers=4, num_heads=4)
    )
    config.model.connector = ConfigDict(dict(name="align", vocab_scale_init=2.0))
    config.model.language = ConfigDict(
        dict(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=384,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
        )
    )

    # A page is two tiles of 10 x 10 patches, 200 visual tokens, with at most 88 text tokens: a bin holds two pages.
    config.data = ConfigDict()
    config.data.root = "runs/demo/data"
    config.data.tiling = ConfigDict(dict(rule="ovis", tile_size=80, max_tiles=4, thumbnail=False))
    config.data.packing = ConfigDict(
        dict(tokens_per_bin=576, tiles_per_bin=4, bins_per_microbatch=4, examples_per_bin=4)
    )

    # The questions of a page are one record and become turns of one conversation, so each page is read once without
    # trees too. `nano_trees.py` makes a branch of each, which answers no more questions right (docs/trees.md).
    config.data.group_questions = "off"

    # Stage 1 trains the connector fast and the other parts slowly, because an untrained connector feeds noise to the
    # decoder. The number of steps matters, not the number of pages (the loss is 0.9 after 100 steps both with 16 and
    # with 32 pages per step), so batches are small.
    config.stages = [
        stage("captions", task="transcribe", steps=300, batch=8, connector=4e-3, others=2e-4),
        stage("documents", task="mixed", steps=300, batch=16, connector=2e-3, others=6e-4),
        stage(
            "questions",
            task="qa",
            steps=130,
            batch=16,
            connector=5e-4,
            others=3e-4,
            trainable=("connector", "language"),
        ),
    ]
    config.checkpoint = ConfigDict(dict(every_steps=200, keep=2))
    config.log_every_steps = 10
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    return config


def stage(
    name: str,
    task: str,
    steps: int,
    batch: int,
    connector: float,
    others: float,
    trainable: tuple[str, ...] = ("vision", "connector", "language"),
) -> ConfigDict:
    """Returns a stage; `connector` and `others` are peak learning rates."""
    return ConfigDict(
        dict(
            name=name,
            trainable=trainable,
            mixture=[dict(dataset="documents", split="train", task=task, weight=1.0)],
            steps=steps,
            global_batch=batch,
            learning_rates=dict(vision=others, connector=connector, language=others),
            schedule="cosine",
            warmup_steps=10,
            final_lr_fraction=0.1,
            optimizer=dict(name="muon", weight_decay=0.01, clip_norm=1.0),
            max_text_tokens=256,
        )
    )
