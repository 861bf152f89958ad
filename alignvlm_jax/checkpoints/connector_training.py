"""Tells whether the connector of a checkpoint was ever trained.

An import joins two trained backbones with a connector of random weights. Such a checkpoint can be asked, but its
answers mean nothing. The history and the progress of the weights record what happened to them.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def is_connector_trained(
    history: Sequence[Mapping[str, Any]], progress: Mapping[str, Any], config: Mapping[str, Any]
) -> bool:
    """Returns whether the connector was trained, as far as is known; weights of unknown origin count as trained.

    Args:
      history: history of the weights that the run started with; see `checkpoints/weights.py`.
      progress: `Progress` of the run itself.
      config: config of the run.
    """
    run = {"what": "trained", "progress": progress, "config": config}
    return any(_trains_connector(event) for event in (*history, run))


def _trains_connector(event: Mapping[str, Any]) -> bool:
    if event.get("what") == "saved by PyTorch":
        return True  # It does not say what was trained.
    if event.get("what") != "trained":
        return False
    try:
        progress, stages = event["progress"], event["config"]["stages"]
        # Stages before the current one are complete; the current one counts from its first step on.
        begun = progress["stage"] + (progress["step_in_stage"] > 0)
        return any("connector" in stage["trainable"] for stage in stages[:begun])
    except (KeyError, TypeError):
        return True
