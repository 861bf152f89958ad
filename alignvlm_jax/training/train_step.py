"""One optimizer step, as a pure function: the same one is trained, tested and compiled ahead of time.

Axis letters: K microbatches, B bins (rows), L positions, M tiles per bin, V vocabulary.

The loss of a step is the sum over all answer tokens of the *global* batch divided by their total weight, so it does not
matter how examples fell into bins and bins into microbatches: every microbatch adds its sum of losses, its weight and
its gradient of the sum, and the division comes once, at the end.
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

from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, Batch, Params, random_parameters
from alignvlm_jax.parallel import sharding
from alignvlm_jax.training import stages
from alignvlm_jax.training.optimizer import make_optimizer

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
"""What the step reads of the packed batch; the other fields are for reports and stay on the host."""

RESAMPLING_FIELDS = ("visual_sources", "visual_weights")
"""What it reads besides of the batches of a model with newlines."""


class TrainState(flax.struct.PyTreeNode):
    """Attributes:
    step: optimizer steps done in this stage.
    params: all weights, float32, frozen ones included.
    opt_state: the optimizer's state of the trainable parts.
    learning_rates: the peak of each trainable part, which never changes. As data of the compiled step and not constants
      in it: another rate, in a tuning trial or a next stage, is not another program, and a compilation cache has it.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    learning_rates: dict[str, Float[Array, ""]]


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def create_state(stage: stages.StageConfig, params: Params) -> TrainState:
    """The state a stage starts from. Pure: evaluate its shapes, or jit it into shardings."""
    opt_state = stages.stage_optimizer(stage).init(stages.trainable_params(stage, params))
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, peak_learning_rates(stage))


def peak_learning_rates(stage: stages.StageConfig, where: Any = None) -> dict[str, Float[Array, ""]]:
    """Of each trainable part, on the devices of the sharding `where`."""
    return {part: jax.device_put(jnp.float32(getattr(stage.learning_rates, part)), where) for part in stage.trainable}


def abstract_state(model_config: AlignVLMConfig, stage: stages.StageConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored into, and what is compiled ahead."""
    boxed = jax.eval_shape(lambda: random_parameters(model_config, jax.random.key(0)))
    shapes = jax.eval_shape(lambda params: create_state(stage, params), nn.unbox(boxed))
    of_params = sharding.parameter_shardings(boxed, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    of_opt_state = sharding.optimizer_state_shardings(shapes.opt_state, shapes.params, of_params, mesh)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        TrainState(everywhere, of_params, of_opt_state, dict.fromkeys(shapes.learning_rates, everywhere)),
    )


def state_shardings(model_config: AlignVLMConfig, stage: stages.StageConfig, mesh: Mesh) -> TrainState:
    """Where each array of the state lives, as a `TrainState` of `NamedSharding`s."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model_config, stage, mesh))


def place_state(model_config: AlignVLMConfig, stage: stages.StageConfig, mesh: Mesh, params: Params) -> TrainState:
    """`create_state` straight into its shardings.

    `params` may be on the host, or on the mesh already; then they are not copied, and the first step consumes them.
    """
    where = state_shardings(model_config, stage, mesh)
    params = jax.device_put(params, where.params)
    init = jax.jit(stages.stage_optimizer(stage).init, out_shardings=where.opt_state)
    step = jax.device_put(jnp.zeros((), jnp.int32), where.step)
    opt_state = init(stages.trainable_params(stage, params))
    return TrainState(step, params, opt_state, peak_learning_rates(stage, where.step))


def make_train_step(model_config: AlignVLMConfig, stage: stages.StageConfig) -> TrainStep:
    """Makes `train_step(state, batch) -> (state, metrics)`, pure and not yet jitted.

    A step whose loss or gradients are not finite counts as done, but leaves weights and optimizer as they are; its
    metric "skipped" is 1. The batch is the packed batch with its leading axis K; the metrics are float32 scalars over
    the whole of it.
    """
    model = AlignVLM(model_config)

    def summed_loss(trainable: Params, frozen: Params, microbatch: Batch):
        output = model.apply({"params": {**frozen, **trainable}}, microbatch, method="loss")
        tiles = jnp.sum(microbatch["tile_valid_hw"][..., 0] > 0).astype(jnp.float32)
        real = microbatch["segment_ids"] > 0
        # Positions of a segment are 0 .. n - 1, so the sum of 2 p + 1 over it is n².
        squares = jnp.where(real, 2.0 * microbatch["positions"] + 1.0, 0.0)
        sums = {
            "loss": output.loss,
            "weight": output.weight,
            "answers": jnp.sum(microbatch["loss_weights"] > 0).astype(jnp.float32),
            "tokens": jnp.sum(real).astype(jnp.float32),
            "squared_lengths": jnp.sum(squares),
            "positions": jnp.float32(microbatch["segment_ids"].size),
            "tiles": tiles,
            "effective_tokens": output.effective_tokens * tiles,
        }
        return output.loss, sums

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        schedules = stages.stage_schedules(stage, state.learning_rates)
        optimizer = make_optimizer(stage.optimizer, schedules)
        trainable = stages.trainable_params(stage, state.params)
        frozen = stages.frozen_params(stage, state.params)

        def accumulate(carry, microbatch):
            (_, sums), gradients = jax.value_and_grad(summed_loss, has_aux=True)(trainable, frozen, microbatch)
            return jax.tree.map(jnp.add, carry, (gradients, sums)), None

        with sharding.logical_rules():
            one = jax.tree.map(lambda field: field[0], batch)
            zeros = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                (trainable, jax.eval_shape(summed_loss, trainable, frozen, one)[1]),
            )
            # A scan over one microbatch is unrolled: no loop, so XLA sees all of the step.
            (gradients, sums), _ = jax.lax.scan(accumulate, zeros, batch, unroll=len(batch["tokens"]) == 1)

        # A step without a single answer has gradient 0, not NaN.
        weight = jnp.where(sums["weight"] > 0, sums["weight"], 1.0)
        gradients = jax.tree.map(lambda gradient: gradient / weight, gradients)
        grad_norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trainable)
        # One infinity or NaN among the gradients, and their norm is none either.
        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)
        moved, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(trainable, updates), opt_state),
            (trainable, state.opt_state),
        )
        params = {**frozen, **moved}
        metrics = {
            "loss": sums["loss"] / weight,
            "weight": sums["weight"],
            "answers": sums["answers"],
            "grad_norm": grad_norm,
            "skipped": 1.0 - finite.astype(jnp.float32),
            "tokens": sums["tokens"],
            "squared_lengths": sums["squared_lengths"],
            "token_fraction": sums["tokens"] / sums["positions"],
            "tiles": sums["tiles"],
            "effective_tokens": sums["effective_tokens"] / jnp.maximum(sums["tiles"], 1.0),
            **{f"learning_rate/{part}": jnp.float32(rate(state.step)) for part, rate in schedules.items()},
        }
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def jit_train_step(model_config: AlignVLMConfig, stage: stages.StageConfig, mesh: Mesh) -> TrainStep:
    """The step compiled for a mesh: the state stays where it lies (and is donated), the bins are spread."""
    where = state_shardings(model_config, stage, mesh)
    return jax.jit(
        make_train_step(model_config, stage),
        in_shardings=(where, NamedSharding(mesh, sharding.BATCH_SPEC)),
        out_shardings=(where, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
