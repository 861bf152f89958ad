"""The paper's 1B model: SigLIP So400m/14 at 384 px, ALIGN and Llama-3.2-1B, trained in the paper's three stages.

    alignvlm train --config configs/alignvlm_1b.py --workdir runs/1b

The backbones are downloaded from the Hugging Face Hub, where Llama's terms have to be accepted first. For folders, set
`config.backbones.vision` and `config.backbones.language`. The data sets (captions of CC-12M, BigDocs-7.5M,
DocDownstream) are folders under `data.root`.

Source: arXiv 2502.01341. Stages, trained parts, global batches, learning rates, text lengths and epochs are the
paper's. The paper does not state the optimizer, the schedule or the warm-up. This config uses choices that are common
for VLMs: AdamW without weight decay, cosine decay to 0, and 500 warm-up steps.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config of the experiment."""
    config = ConfigDict()
    config.seed = 0
    config.backbones = ConfigDict(
        dict(vision="google/siglip-so400m-patch14-384", language="meta-llama/Llama-3.2-1B-Instruct")
    )
    # The shapes of encoder and decoder are those of the backbones.
    config.model = ConfigDict(
        dict(vision=dict(remat="full"), connector=dict(name="align"), language=dict(remat="full"))
    )

    # A scanned page takes nine tiles and a thumbnail, 7,290 visual tokens. Bins for two pages, 29 x 512 tokens, are
    # 97 % full on a mixture of pages and photographs (`tools/benchmark.py packing`). Bins for one page would be a
    # quarter padding, because each needs space for 2,048 text tokens.
    config.data = ConfigDict()
    config.data.root = "data"
    config.data.tiling = ConfigDict(dict(rule="ovis", max_tiles=9, thumbnail=True))
    config.data.packing = ConfigDict(
        dict(tokens_per_bin=14848, tiles_per_bin=20, bins_per_microbatch=64, examples_per_bin=32)
    )

    # Each record is an example, as in the paper. "tree" reads a page once for all of its questions (docs/trees.md). For
    # records with one question each, as DocVQA's, it takes a quarter of the work per answer.
    config.data.group_questions = "off"

    everything, all_but_vision = ("vision", "connector", "language"), ("connector", "language")
    config.stages = [
        stage("captions", "cc12m", everything, epochs=1, batch=512, rate=1e-5, max_text_tokens=1024),
        stage("documents", "bigdocs", everything, epochs=1, batch=512, rate=5e-5, max_text_tokens=2048),
        stage("tasks", "docdownstream", all_but_vision, epochs=5, batch=512, rate=5e-5, max_text_tokens=2048),
    ]
    config.checkpoint = ConfigDict(dict(every_steps=1000, keep=2))
    config.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
    return config


def stage(
    name: str, dataset: str, trainable: tuple[str, ...], epochs: float, batch: int, rate: float, max_text_tokens: int
) -> ConfigDict:
    """Returns the config of a stage with one data set and one learning rate for all trained parts."""
    return ConfigDict(
        dict(
            name=name,
            trainable=trainable,
            mixture=[dict(dataset=dataset, split="train", task="conversation", weight=1.0)],
            epochs=float(epochs),
            global_batch=batch,
            learning_rates=dict(vision=rate, connector=rate, language=rate),
            schedule="cosine",
            warmup_steps=500,
            optimizer=dict(name="adamw", weight_decay=0.0, clip_norm=1.0),
            max_text_tokens=max_text_tokens,
        )
    )
