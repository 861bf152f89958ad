"""One optimizer step as a pure function. Training, the tests and ahead-of-time compilation all use it.

Axis letters: K microbatches, B bins (rows), L positions, M tiles per bin, V vocabulary.

The loss of a step is the sum over all answer tokens of the *global* batch, divided by their total weight. It does not
depend on how examples are packed into bins, and bins into microbatches: every microbatch contributes its sum of losses,
its weight and the gradient of its sum, and the division happens once at the end.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, AlignVLMLoss, Batch, Params, parameter_shapes
from alignvlm_jax.ops.gradient_dtype import exchange_gradients_in
from alignvlm_jax.parallel import sharding
from alignvlm_jax.training.optimizer import make_optimizer
from alignvlm_jax.training.stages import frozen_params, stage_optimizer, stage_schedules, trainable_params

Metrics = dict[str, Float[Array, ""]]

FIELDS = (
    "tokens",
    "targets",
    "loss_weights",
    "segment_ids",
    "positions",
    "visual_index",
    "tiles",
    "tile_valid_hw",
)
"""Fields of the packed batch that the step reads. The other fields are for reports and stay on the host."""

RESAMPLING_FIELDS = ("visual_sources", "visual_weights")
"""Additional fields that the step of a model with newlines reads."""

TREE_FIELDS = ("branch_ids",)
"""Additional fields that the step reads if examples are packed as trees."""

TEXT_FIELDS = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
"""Fields that the step of the decoder alone reads."""


def batch_fields(model: AlignVLMConfig, is_tree: bool = False) -> tuple[str, ...]:
    """Returns the fields of the packed batch that the step of a model reads, with or without trees."""
    return FIELDS + (RESAMPLING_FIELDS if model.newline else ()) + (TREE_FIELDS if is_tree else ())


class TrainState(flax.struct.PyTreeNode):
    """State of training within a stage.

    Attributes:
      step: optimizer steps done in this stage.
      params: all weights, float32, frozen ones included.
      opt_state: the optimizer's state of the trainable parts.
      learning_rates: peak rate of each trainable part, constant within a stage. The rates are inputs of the compiled
        step, not constants in it, so a tuning trial or a stage with other rates reuses the cached program.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    learning_rates: dict[str, Float[Array, ""]]


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@ordinary_modes()
def create_state(stage: StageConfig, params: Params) -> TrainState:
    """Returns the state that a stage starts with. It can be jitted, and passed to `jax.eval_shape`."""
    opt_state = stage_optimizer(stage).init(trainable_params(stage, params))
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, peak_learning_rates(stage))


@ordinary_modes()
def peak_learning_rates(
    stage: StageConfig, sharding: jax.sharding.Sharding | None = None
) -> dict[str, Float[Array, ""]]:
    """Returns the peak learning rate of each trainable part, placed on `sharding`."""
    rates = {part: jnp.float32(getattr(stage.learning_rates, part)) for part in stage.trainable}
    return {part: jax.device_put(rate, sharding) for part, rate in rates.items()}


@ordinary_modes()
def abstract_state(model_config: AlignVLMConfig, stage: StageConfig, mesh: Mesh) -> TrainState:
    """Returns the shapes, dtypes and shardings of the state, for restoring a checkpoint or compiling the step."""
    # The boxes hold the logical axis names of the weights, from which their shardings follow.
    boxed = parameter_shapes(model_config)
    shapes = jax.eval_shape(lambda params: create_state(stage, params), nn.unbox(boxed))
    params = sharding.parameter_shardings(boxed, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    opt_state = sharding.optimizer_state_shardings(shapes.opt_state, shapes.params, params, mesh)
    return jax.tree.map(
        lambda leaf, placement: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement),
        shapes,
        TrainState(replicated, params, opt_state, dict.fromkeys(shapes.learning_rates, replicated)),
    )


def state_shardings(model_config: AlignVLMConfig, stage: StageConfig, mesh: Mesh) -> TrainState:
    """Returns the sharding of each array of the state, as a `TrainState` of `NamedSharding`s."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model_config, stage, mesh))


@ordinary_modes()
def place_state(model_config: AlignVLMConfig, stage: StageConfig, mesh: Mesh, params: Params) -> TrainState:
    """Returns the state that a stage starts with, every array created in its sharding.

    `params` may be on the host or on the mesh. In the latter case they are not copied, and the first step, which
    donates its state, consumes them.
    """
    shardings = state_shardings(model_config, stage, mesh)
    params = jax.device_put(params, shardings.params)
    # Jit with output shardings, so that no device ever holds the complete optimizer state.
    init = jax.jit(stage_optimizer(stage).init, out_shardings=shardings.opt_state)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    opt_state = init(trainable_params(stage, params))
    return TrainState(step, params, opt_state, peak_learning_rates(stage, shardings.step))


def make_train_step(
    model_config: AlignVLMConfig,
    stage: StageConfig,
    *,
    gradient_dtype: str = "float32",
    is_text_only: bool = False,
    branch_tokens: int | None = None,
) -> TrainStep:
    """Returns `train_step(state, batch) -> (state, metrics)`, pure and not yet jitted.

    The batch is the packed batch with its leading axis K. The metrics are float32 scalars over the whole batch. A step
    whose loss or gradients are not finite counts as done, but leaves weights and optimizer unchanged; its metric
    "skipped" is 1.

    Args:
      model_config: settings of the model.
      stage: the stage.
      gradient_dtype: dtype in which devices exchange gradients of weights (`ops/gradient_dtype.py`).
      is_text_only: whether the batch has no images and the state no other part than the decoder (`without_images`).
      branch_tokens: largest number of positions with a branch in a row, if the batch has `branch_ids`; None means L.
    """
    model = AlignVLM(model_config)

    def summed_loss(trainable: Params, frozen: Params, microbatch: Batch):
        method = "text_loss" if is_text_only else "loss"
        output = model.apply({"params": {**frozen, **trainable}}, microbatch, branch_tokens, method=method)
        return output.loss, _microbatch_sums(output, microbatch)

    @ordinary_modes()
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        schedules = stage_schedules(stage, state.learning_rates)
        optimizer = make_optimizer(stage.optimizer, schedules)
        trainable = trainable_params(stage, state.params)
        frozen = frozen_params(stage, state.params)

        # Sum gradients and metrics over the microbatches.
        def accumulate(carry, microbatch):
            (_, sums), gradients = jax.value_and_grad(summed_loss, has_aux=True)(trainable, frozen, microbatch)
            return jax.tree.map(jnp.add, carry, (gradients, sums)), None

        with sharding.logical_rules(), exchange_gradients_in(gradient_dtype):
            first_microbatch = jax.tree.map(lambda field: field[0], batch)
            zeros = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                (trainable, jax.eval_shape(summed_loss, trainable, frozen, first_microbatch)[1]),
            )
            # Unroll a scan over one microbatch, so that XLA can optimize the step as a whole.
            (gradients, sums), _ = jax.lax.scan(accumulate, zeros, batch, unroll=len(batch["tokens"]) == 1)

        # Divide once by the total weight. The gradient of a step without any answer is 0, not NaN.
        weight = jnp.where(sums["weight"] > 0, sums["weight"], 1.0)
        gradients = jax.tree.map(lambda gradient: gradient / weight, gradients)
        grad_norm = optax.tree.norm(gradients)

        # Update weights and optimizer, unless the loss or a gradient is not finite. `where` on the device, because
        # a decision on the host would have to wait for the gradients.
        updates, opt_state = optimizer.update(gradients, state.opt_state, trainable)
        # One infinite or NaN gradient suffices to make the norm infinite or NaN.
        is_finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)
        updated, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old),
            (optax.apply_updates(trainable, updates), opt_state),
            (trainable, state.opt_state),
        )
        params = {**frozen, **updated}

        metrics = {
            "loss": sums["loss"] / weight,
            "weight": sums["weight"],
            "answer_tokens": sums["answer_tokens"],
            "grad_norm": grad_norm,
            "skipped": 1.0 - is_finite.astype(jnp.float32),
            "tokens": sums["tokens"],
            "squared_lengths": sums["squared_lengths"],
            "token_fraction": sums["tokens"] / sums["positions"],
            "tiles": sums["tiles"],
            **{f"learning_rate/{part}": jnp.float32(rate(state.step)) for part, rate in schedules.items()},
        }
        if "effective_tokens" in sums:
            metrics["effective_tokens"] = sums["effective_tokens"] / jnp.maximum(sums["tiles"], 1.0)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def _microbatch_sums(output: AlignVLMLoss, microbatch: Batch) -> Metrics:
    """Returns the sums over a microbatch from which the metrics of a step are computed."""
    tiles = jnp.float32(0)
    if "tile_valid_hw" in microbatch:  # not in rows of text
        tiles = jnp.sum(microbatch["tile_valid_hw"][..., 0] > 0, dtype=jnp.float32)
    is_real = microbatch["segment_ids"] > 0  # not padding
    # The positions p of a segment of length n are 0 .. n - 1, and the sum of 2 p + 1 over them is n². A branch counts
    # what it attends to, because its positions continue those of the page.
    squares = jnp.where(is_real, 2.0 * microbatch["positions"] + 1.0, 0.0)
    sums = {
        "loss": output.loss,
        "weight": output.weight,
        "answer_tokens": jnp.sum(microbatch["loss_weights"] > 0).astype(jnp.float32),
        "tokens": jnp.sum(is_real).astype(jnp.float32),
        "squared_lengths": jnp.sum(squares),
        "positions": jnp.float32(microbatch["segment_ids"].size),
        "tiles": tiles,
    }
    if output.effective_tokens is not None:
        # A mean over tiles, turned back into a sum that microbatches can add up.
        sums["effective_tokens"] = output.effective_tokens * tiles
    return sums


def without_images(state: TrainState) -> TrainState:
    """Returns the state of the decoder alone, or its shapes or shardings; the stage must not train another part."""
    return state.replace(params={"language": state.params["language"]})


def jit_train_step(
    model_config: AlignVLMConfig,
    stage: StageConfig,
    mesh: Mesh,
    *,
    gradient_dtype: str = "float32",
    is_text_only: bool = False,
    branch_tokens: int | None = None,
) -> TrainStep:
    """Returns the step jitted for a mesh. The state keeps its shardings and is donated; the bins are sharded."""
    options = dict(gradient_dtype=gradient_dtype, is_text_only=is_text_only, branch_tokens=branch_tokens)
    shardings = state_shardings(model_config, stage, mesh)
    shardings = without_images(shardings) if is_text_only else shardings
    return jax.jit(
        make_train_step(model_config, stage, **options),
        in_shardings=(shardings, NamedSharding(mesh, sharding.BATCH_SPEC)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
