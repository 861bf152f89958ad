"""Where a NaN comes from."""


import jax
from jax.sharding import Mesh

from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import AlignVLMConfig, Batch
from alignvlm_jax.training.train_step import TrainState, make_train_step


def explain_skipped(
    model: AlignVLMConfig, stage: StageConfig, mesh: Mesh, state: TrainState, batch: Batch, step: int
) -> None:
    """Does a step again that was skipped, not compiled, and stops at the first NaN.

    Args:
      model, stage, mesh: of the step.
      state: after it, which is as before it.
      batch: on the mesh.
      step: its number, for the message.

    Raises:
      UserError: always: with the operation, or that there is none (then something was infinite).
    """
    with jax.set_mesh(mesh), jax.disable_jit(), jax.debug_nans(True):
        try:
            make_train_step(model, stage)(state, batch)
        except FloatingPointError as error:
            # The innermost line of ours that the operation, or in the backward pass its gradient, comes from.
            place = _innermost(error)
            raise UserError(f"step {step}: {str(error).splitlines()[0].rstrip('.')}{place}") from error
    raise UserError(
        f"step {step}: its loss or gradients are not finite, but no operation gives NaN where each is done by itself: "
        "something grows to infinity (try float32, or a lower learning rate)"
    )


def _innermost(error: BaseException) -> str:
    found, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "alignvlm_jax" in name and not name.endswith("training/debug.py"):
            found = f", in {name}, line {trace.tb_lineno} ({trace.tb_frame.f_code.co_name})"
        trace = trace.tb_next
    return found
