"""Finds the operation that produced a NaN."""

import jax
from jax.sharding import Mesh

from alignvlm_jax.errors import UserError
from alignvlm_jax.models.alignvlm import Batch
from alignvlm_jax.training.train_step import TrainState, TrainStep


def explain_skipped(train_step: TrainStep, mesh: Mesh, state: TrainState, batch: Batch, step: int) -> None:
    """Repeats a skipped step operation by operation, and raises an error at the first NaN.

    Args:
      train_step: the step, not jitted.
      mesh: devices of the step.
      state: state after the step. A skipped step leaves weights and optimizer as they were before.
      batch: batch of the step, on the mesh.
      step: number of the step, for the message.

    Raises:
      UserError: always. The message names the operation that produced the NaN. If there is none, a value grew to
        infinity, and the message says so.
    """
    with jax.set_mesh(mesh), jax.disable_jit(), jax.debug_nans(True):
        try:
            train_step(state, batch)
        except FloatingPointError as error:
            place = _innermost_line(error)
            raise UserError(f"step {step}: {str(error).splitlines()[0].rstrip('.')}{place}") from error
    raise UserError(
        f"step {step}: its loss or gradients are not finite, but no single operation returns NaN: a value grows to "
        "infinity (try float32, or a lower learning rate)"
    )


def _innermost_line(error: BaseException) -> str:
    """Returns ", in FILE, line N (FUNCTION)" for the innermost line of this package in the error's traceback.

    That line holds the operation that produced the NaN, or the operation whose gradient did. The result is empty if no
    line of this package is in the traceback.
    """
    place, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "alignvlm_jax" in name and not name.endswith("training/debug.py"):
            place = f", in {name}, line {trace.tb_lineno} ({trace.tb_frame.f_code.co_name})"
        trace = trace.tb_next
    return place
