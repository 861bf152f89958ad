"""The paper's 3B model: `alignvlm_1b.py` with Llama-3.2-3B and half the batch in stages 2 and 3.

    alignvlm train --config configs/alignvlm_3b.py --workdir runs/3b

Source: arXiv 2502.01341.
"""

from ml_collections import ConfigDict

from alignvlm_jax.config import read_config_file


def get_config() -> ConfigDict:
    """Returns the config of the experiment."""
    config = read_config_file("configs/alignvlm_1b.py")
    config.backbones.language = "meta-llama/Llama-3.2-3B-Instruct"
    for stage, batch, rate in zip(config.stages, (512, 256, 256), (1e-5, 5e-5, 5e-5), strict=True):
        stage.global_batch = batch
        stage.learning_rates = ConfigDict(dict(vision=rate, connector=rate, language=rate))
    return config
