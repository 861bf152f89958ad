"""The paper's 8B model: `alignvlm_1b.py` with Llama-3.1-8B, half the batch in stages 2 and 3, and rates of 1e-5.

    alignvlm train --config configs/alignvlm_8b.py --workdir runs/8b

Source: arXiv 2502.01341.
"""

from ml_collections import ConfigDict

from alignvlm_jax.config import read_config_file


def get_config() -> ConfigDict:
    """Returns the config of the experiment."""
    config = read_config_file("configs/alignvlm_1b.py")
    config.backbones.language = "meta-llama/Llama-3.1-8B-Instruct"
    for stage, batch, rate in zip(config.stages, (512, 256, 256), (1e-5, 1e-5, 1e-5), strict=True):
        stage.global_batch = batch
        stage.learning_rates = ConfigDict(dict(vision=rate, connector=rate, language=rate))
    return config
