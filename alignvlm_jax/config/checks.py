"""Checks an experiment beyond the types of its fields: allowed values, and sizes that must fit together.

Every failed check raises a `UserError` that names the key's full path and the expected value.
"""

import math
from typing import Any

from alignvlm_jax.config.building import check_one_of, join_names
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.optimizer import OPTIMIZERS, OptimizerConfig
from alignvlm_jax.config.run import traced_steps
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import hardware, rematerialization
from alignvlm_jax.models.alignvlm import PARTS, AlignVLMConfig, connector_shape
from alignvlm_jax.models.connectors import connector_spec
from alignvlm_jax.ops.attention import KERNELS


def check(config: ExperimentConfig) -> None:
    """Checks an experiment.

    Raises:
      UserError: if it cannot be run.
    """
    _check_model(config.model)
    _check_tiles(config)
    _check_run(config)
    _check_data(config)
    _check_stages(config)


def _check_model(model: AlignVLMConfig) -> None:
    vision, language = model.vision, model.language
    # Allowed values and positive sizes.
    for name, part in (("vision", vision), ("language", language)):
        path = f"config.model.{name}"
        check_one_of(f"{path}.dtype", part.dtype, hardware.DTYPES)
        check_one_of(f"{path}.attention", part.attention, (hardware.AUTO, *KERNELS))
        _check_remat(f"{path}.remat", part.remat)
        _check_positive(path, part, "hidden_size", "intermediate_size", "num_layers", "num_heads")
    _check_positive("config.model.vision", vision, "image_size", "patch_size")
    _check_positive("config.model.language", language, "vocab_size", "num_kv_heads", "max_position_embeddings")
    # Sizes that must fit together.
    if vision.patch_size > vision.image_size:
        raise UserError(
            f"config.model.vision.patch_size: expected at most image_size, {vision.image_size}, got {vision.patch_size}"
        )
    if vision.hidden_size % vision.num_heads:
        raise UserError(
            f"config.model.vision.num_heads: expected a divisor of hidden_size {vision.hidden_size}, got "
            f"{vision.num_heads}"
        )
    if language.head_dim is None and language.hidden_size % language.num_heads:
        raise UserError(
            f"config.model.language.num_heads: expected a divisor of hidden_size {language.hidden_size}, got "
            f"{language.num_heads} (set head_dim for heads of another width)"
        )
    if language.num_heads % language.num_kv_heads:
        raise UserError(
            f"config.model.language.num_kv_heads: expected a divisor of num_heads {language.num_heads}, got "
            f"{language.num_kv_heads}"
        )
    if language.head_width % 2:
        raise UserError(
            "config.model.language.head_dim: expected an even number (rotary embeddings rotate pairs), got "
            f"{language.head_width}"
        )
    # The connector checks its own settings.
    spec = connector_spec(model.connector)
    if spec.check is not None:
        spec.check(model.connector, connector_shape(model))


def _check_remat(path: str, remat: str) -> None:
    """Checks the list of values that the backward pass keeps."""
    names = remat.split(",")
    for name in names:
        check_one_of(path, name, (*rematerialization.WORDS, *rematerialization.KEPT))
    alone = [name for name in names if name in rematerialization.WORDS]
    if alone and len(names) > 1:
        raise UserError(
            f"{path}: {alone[0]!r} cannot be combined with other names, got {remat!r}: list only what to keep "
            f"({join_names(rematerialization.KEPT)})"
        )


def _check_tiles(config: ExperimentConfig) -> None:
    """Checks that the tiling of images fits the vision encoder and the connector."""
    if config.data.tiling.tile_size != config.model.vision.image_size:
        raise UserError(
            f"config.data.tiling.tile_size: expected the encoder's image_size, {config.model.vision.image_size}, "
            f"got {config.data.tiling.tile_size}"
        )
    is_anyres = config.data.tiling.rule == "anyres_max_9"
    if config.model.newline != is_anyres:
        raise UserError(
            f"config.model.newline: expected {is_anyres} with config.data.tiling.rule {config.data.tiling.rule!r}, got "
            f"{config.model.newline}: rows of visual tokens end with a newline only with anyres_max_9"
        )
    spec = connector_spec(config.model.connector)
    if is_anyres and not spec.is_spatial:
        raise UserError(
            "config.data.tiling.rule: anyres_max_9 joins the visual tokens of adjacent tiles, but the tokens of a "
            f"{spec.title} have no positions in their tile: expected ovis or internvl, or another connector"
        )


def _check_run(config: ExperimentConfig) -> None:
    """Checks the settings of logs, checkpoints, scores, anomalies and profiles."""
    _check_positive("config", config, "log_every_steps")
    _check_positive("config.checkpoint", config.checkpoint, "every_steps", "keep")
    _check_positive("config.evaluation", config.evaluation, "batch_size", "max_new_tokens", "logged_answers")
    for name in ("every_steps", "limit", "log_answers_every_steps"):
        if getattr(config.evaluation, name) is not None:
            _check_positive("config.evaluation", config.evaluation, name)
    _check_not_negative("config.checkpoint", config.checkpoint, "keep_best")
    _check_positive("config.anomalies", config.anomalies, "max_skipped")
    _check_not_negative("config.anomalies", config.anomalies, "max_rollbacks", "spike")
    keep_every, every = config.checkpoint.keep_every, config.checkpoint.every_steps
    if keep_every is not None and (keep_every < 1 or keep_every % every):
        raise UserError(f"config.checkpoint.keep_every: expected a multiple of every_steps, {every}, got {keep_every}")
    try:
        traced_steps(config.profile)
    except ValueError as error:
        raise UserError(f"config.profile.steps: {error}") from error


def _check_data(config: ExperimentConfig) -> None:
    _check_positive("config.data", config.data, "max_image_pixels", "read_threads", "prefetch_batches")
    if config.data.max_turns is not None:
        _check_positive("config.data", config.data, "max_turns")
    _check_not_negative("config.data", config.data, "workers", "max_refused")
    if config.data.max_refused > 1:
        raise UserError(f"config.data.max_refused: expected a fraction from 0 to 1, got {config.data.max_refused}")


def _check_stages(config: ExperimentConfig) -> None:
    if not config.stages:
        raise UserError("config.stages: expected at least one stage, got none")
    for index, stage in enumerate(config.stages):
        _check_stage(stage, f"config.stages.{index}")
        # A step consists of whole microbatches.
        bins, rows = stage.bins_per_step, config.data.packing.bins_per_microbatch
        if bins is not None and (bins < 1 or bins % rows):
            raise UserError(
                f"config.stages.{index}.bins_per_step: expected a multiple of data.packing.bins_per_microbatch, "
                f"{rows}, got {bins}"
            )
    names = [stage.name for stage in config.stages]
    if len(set(names)) < len(names):
        raise UserError(f"config.stages: expected stages with different names, got {join_names(names)}")


def _check_stage(stage: StageConfig, path: str) -> None:
    if not stage.trainable:
        raise UserError(f"{path}.trainable: expected at least one of {join_names(PARTS)}, got none")
    for index, part in enumerate(stage.trainable):
        check_one_of(f"{path}.trainable.{index}", part, PARTS)
        if part in stage.trainable[:index]:
            raise UserError(f"{path}.trainable.{index}: {part!r} is listed twice")
    # Length, sizes and rates.
    if (stage.steps is None) == (stage.epochs is None):
        raise UserError(f"{path}: expected either steps or epochs, got {'neither' if stage.steps is None else 'both'}")
    _check_positive(path, stage, *(name for name in ("steps", "epochs") if getattr(stage, name) is not None))
    _check_positive(path, stage, "global_batch", "max_text_tokens")
    for name in ("vision", "connector", "language"):
        _check_not_negative(f"{path}.learning_rates", stage.learning_rates, name)
    _check_not_negative(path, stage, "warmup_steps", "final_lr_fraction")
    if stage.steps is not None and stage.warmup_steps >= stage.steps:
        raise UserError(f"{path}.warmup_steps: expected fewer than the stage's {stage.steps}, got {stage.warmup_steps}")
    if stage.final_lr_fraction > 1:
        raise UserError(f"{path}.final_lr_fraction: expected at most 1, got {stage.final_lr_fraction}")
    _check_optimizer(stage.optimizer, f"{path}.optimizer")
    if not stage.mixture:
        raise UserError(f"{path}.mixture: expected at least one data set, got none")
    for index, part in enumerate(stage.mixture):
        _check_positive(f"{path}.mixture.{index}", part, "weight")


def _check_optimizer(optimizer: OptimizerConfig, path: str) -> None:
    check_one_of(f"{path}.name", optimizer.name, OPTIMIZERS)
    _check_positive(path, optimizer, "eps", "muon_rms")
    _check_not_negative(path, optimizer, "weight_decay", "b1", "b2", "muon_beta")
    for name in ("b1", "b2", "muon_beta"):
        if getattr(optimizer, name) >= 1:
            raise UserError(f"{path}.{name}: expected less than 1, got {getattr(optimizer, name)}")
    if optimizer.clip_norm is not None:
        _check_positive(path, optimizer, "clip_norm")


def _check_positive(path: str, owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        # The comparison is positive, so that NaN also fails.
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{path}.{name}: expected more than 0, got {value}")


def _check_not_negative(path: str, owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{path}.{name}: expected 0 or more, got {value}")
