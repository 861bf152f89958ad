"""`nano.py` with each question as a branch of its page (docs/trees.md), and as many pages in a step.

    alignvlm demo --config configs/nano_trees.py --out runs/demo_trees

It compares the two ways to train; the shipped model and all figures of the demo are those of `nano.py`.
"""

from ml_collections import ConfigDict

from alignvlm_jax.config import read_config_file


def get_config() -> ConfigDict:
    """Returns the config of the experiment."""
    config = read_config_file("configs/nano.py")
    config.data.group_questions = "tree"
    # A bin holds two pages with at most four questions each. The steps have as many bins as those of nano.py, whose
    # batches count pages.
    config.data.packing.examples_per_bin = 8
    for stage in config.stages:
        stage.bins_per_step = stage.global_batch // 2
    return config
