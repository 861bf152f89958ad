r"""Test of training on one 16 GB GPU: SigLIP-base/16 at 224 px and SmolLM2-135M, on the demo's documents.

    alignvlm train --config configs/debug_gpu.py --workdir runs/debug

Weights are random, and the tokenizer comes from the nano backbone, so nothing needs to be downloaded. The run shows
that training works and how fast it is; the model learns nothing useful. With real backbones:

    alignvlm import --vision google/siglip-base-patch16-224 --language HuggingFaceTB/SmolLM2-135M-Instruct \
        --config configs/debug_gpu.py --out runs/smol
    alignvlm train --config configs/debug_gpu.py --workdir runs/debug --init-from runs/smol
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config of the experiment."""
    config = ConfigDict()
    config.seed = 0
    config.backbones = ConfigDict(dict(vision="random:siglip-base-patch16-224", language="random:SmolLM2-135M"))
    config.model = ConfigDict(
        dict(vision=dict(remat="full"), connector=dict(name="align"), language=dict(remat="full"))
    )

    # A page of the demo is one tile of 196 visual tokens, with at most 256 text tokens.
    config.data = ConfigDict()
    config.data.root = "runs/demo/data"
    config.data.tiling = ConfigDict(dict(rule="ovis", max_tiles=4, thumbnail=True))
    config.data.packing = ConfigDict(
        dict(tokens_per_bin=2048, tiles_per_bin=8, bins_per_microbatch=4, examples_per_bin=8)
    )
    config.stages = [
        ConfigDict(
            dict(
                name="documents",
                trainable=("vision", "connector", "language"),
                mixture=[dict(dataset="documents", split="train", task="mixed", weight=1.0)],
                steps=200,
                global_batch=24,
                learning_rates=dict(vision=1e-5, connector=1e-4, language=1e-5),
                warmup_steps=10,
                max_text_tokens=256,
            )
        )
    ]
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    return config
