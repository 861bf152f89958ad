"""The train step: microbatches and meshes do not change its result, frozen parts do not move, metrics are exact."""

import dataclasses
import functools
import re
from importlib.metadata import version

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from packaging.version import Version

from alignvlm_jax.config.optimizer import OptimizerConfig
from alignvlm_jax.config.stages import LearningRates
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, example_batch, parameter_shapes, random_parameters
from alignvlm_jax.models.connectors import MLPConfig
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training.stages import stage_table
from alignvlm_jax.training.train_step import (
    TEXT_FIELDS,
    abstract_state,
    batch_fields,
    create_state,
    jit_train_step,
    make_train_step,
    place_state,
    without_images,
)
from tests.training.batches import MODEL, random_batch, stage

# Adam with a large eps is almost plain gradient descent, so a wrong gradient shows in size and not only in sign. The
# learning rate of the first step is 1, after the first of the warm-up steps.
DESCENT = stage(optimizer=OptimizerConfig(eps=1.0, clip_norm=None), learning_rates=LearningRates(3.0, 3.0, 3.0))
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def params():
    return nn.unbox(jax.jit(lambda: random_parameters(MODEL, jax.random.key(0)))())


@functools.cache
def jitted(stage_config):
    """Returns the jitted step, which tests of the same stage share."""
    # Without LLVM's optimizations, the sums of jaxlib 0.12 round more than the tests here allow.
    is_new = Version(version("jaxlib")) >= Version("0.12")
    options = {"xla_backend_optimization_level": 3} if is_new else None
    return jax.jit(make_train_step(MODEL, stage_config), compiler_options=options)


def run(stage_config, params, batches):
    """Trains on the batches, on one device; returns the final state and the metrics of each step."""
    state, history = create_state(stage_config, params), []
    for batch in batches:
        state, metrics = jitted(stage_config)(state, batch)
        history.append(jax.tree.map(float, metrics))
    return state, history


def test_microbatches_give_the_same_update_as_one_large_batch(params):
    big = random_batch(3, microbatches=1, bins=8)
    split = jax.tree.map(lambda field: field.reshape(4, 2, *field.shape[2:]), big)
    assert len(set(split["loss_weights"].sum(axis=(1, 2)))) > 1, "the microbatches need different weights"
    one_state, (one_metrics,) = run(DESCENT, params, [big])
    state, (metrics,) = run(DESCENT, params, [split])
    for name in one_metrics:
        np.testing.assert_allclose(metrics[name], one_metrics[name], rtol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), state.params, one_state.params)
    moved = jax.tree.map(jnp.subtract, one_state.params, params)
    assert optax.tree.norm(moved) > 1, "the tolerance is a millionth of the update"


def test_the_step_counts_its_inputs(params):
    batch = random_batch(6, microbatches=2, bins=4)
    _, (metrics,) = run(DESCENT, params, [batch])
    rows = batch["segment_ids"].reshape(8, -1)
    lengths = [np.sum(row == segment) for row in rows for segment in range(1, row.max() + 1)]
    assert len(set(lengths)) > 3
    assert metrics["squared_lengths"] == sum(int(length) ** 2 for length in lengths)
    assert metrics["tokens"] == sum(lengths)
    assert metrics["answer_tokens"] == np.count_nonzero(batch["loss_weights"])
    assert metrics["tiles"] == np.count_nonzero(batch["tile_valid_hw"][..., 0])


def test_empty_bins_change_nothing(params):
    batch = random_batch(4, microbatches=1, bins=4)
    padded = jax.tree.map(lambda field: np.concatenate([field, np.zeros_like(field)], axis=1), batch)
    padded["visual_index"][:, 4:] = -1
    _, (metrics,) = run(DESCENT, params, [batch])
    _, (padded_metrics,) = run(DESCENT, params, [padded])
    for name in ("loss", "weight", "grad_norm", "tokens", "squared_lengths", "tiles", "effective_tokens"):
        np.testing.assert_allclose(metrics[name], padded_metrics[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(padded_metrics["token_fraction"], metrics["token_fraction"] / 2, rtol=1e-6)


@pytest.mark.parametrize("newline", [False, True])
def test_the_step_reads_exactly_its_fields(newline):
    model = dataclasses.replace(MODEL, newline=newline)
    shapes = jax.eval_shape(lambda: example_batch(model, rows=2))
    batch = {name: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype) for name, leaf in shapes.items()}
    state = jax.eval_shape(lambda: create_state(DESCENT, nn.unbox(random_parameters(model, KEY))))
    fields = batch_fields(model)
    jax.eval_shape(make_train_step(model, DESCENT), state, {name: batch[name] for name in fields})
    for missing in fields:
        with pytest.raises(KeyError, match=missing):
            jax.eval_shape(
                make_train_step(model, DESCENT), state, {name: batch[name] for name in fields if name != missing}
            )


def test_a_batch_without_answers_gives_zero_loss_and_finite_weights(params):
    batch = random_batch(5)
    batch["loss_weights"] *= 0
    state, (metrics,) = run(DESCENT, params, [batch])
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("optimizer, trainable", [("muon", ("connector", "language")), ("adamw", ("connector",))])
def test_frozen_parts_do_not_move_and_hold_no_state(params, optimizer, trainable):
    config = stage(trainable=trainable, optimizer=OptimizerConfig(optimizer, weight_decay=0.1))
    state, history = run(config, params, [random_batch(seed) for seed in range(3)])
    frozen = {"vision", "connector", "language"} - set(trainable)
    for part in frozen:
        jax.tree.map(np.testing.assert_array_equal, state.params[part], params[part])
    for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state):
        assert not any(f"'{part}'" in jax.tree_util.keystr(path) for part in frozen), path
    for part in trainable:
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params[part], params[part])
        assert all(jax.tree.leaves(moved)), moved
    rates = [name for name in history[0] if name.startswith("learning_rate/")]
    assert rates == [f"learning_rate/{part}" for part in trainable]


def test_metrics_do_not_count_padding(params):
    batch = random_batch(6)
    _, (metrics,) = run(DESCENT, params, [batch])
    real = batch["segment_ids"] > 0
    assert metrics["tokens"] == real.sum() and metrics["weight"] == batch["loss_weights"].sum()
    np.testing.assert_allclose(metrics["token_fraction"], real.mean(), rtol=1e-6)
    assert metrics["tiles"] == (batch["tile_valid_hw"][..., 0] > 0).sum()
    assert 1 <= metrics["effective_tokens"] <= MODEL.language.vocab_size
    np.testing.assert_allclose(metrics["learning_rate/connector"], 1.0, rtol=1e-6)  # the first of two warm-up steps


def test_the_stage_table_names_frozen_parts(params):
    table = stage_table(stage(trainable=("connector", "language")), params)
    vision = sum(leaf.size for leaf in jax.tree.leaves(params["vision"]))
    (line,) = (line for line in table.splitlines() if line.startswith("vision"))
    assert f"{vision:,}" in line and "frozen" in line
    assert table.count("trained") == 3 and "6.0e-03" in table


def test_a_mesh_gives_the_same_losses_as_one_device(params):
    config = stage()
    batches = [random_batch(seed % 2, microbatches=2, bins=4) for seed in range(20)]
    histories = {}
    for name, mesh in {
        "one": make_mesh(MeshConfig(), jax.devices()[:1]),
        "2x2x2": make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)),
    }.items():
        with jax.set_mesh(mesh):
            state = place_state(MODEL, config, mesh, jax.device_get(params))
            step = jit_train_step(MODEL, config, mesh)
            history = []
            for batch in batches:
                state, metrics = step(state, sharding.shard_batch(batch, mesh))
                history.append(float(metrics["loss"]))
        histories[name] = history
    np.testing.assert_allclose(histories["2x2x2"], histories["one"], rtol=1e-5)
    assert np.mean(history[-2:]) < np.mean(history[:2]) - 0.2, "the loss falls"
    assert_is_sharded(state)


def test_the_1b_step_holds_no_scores_over_the_whole_vocabulary():
    """Traces the step at the paper's size without running it: a page of nine tiles and a thumbnail, with less text."""
    model = AlignVLMConfig()
    words, visual, length = model.language.vocab_size, 10 * model.vision.num_patches, 320
    state = jax.eval_shape(lambda: create_state(stage(), nn.unbox(random_parameters(model, KEY))))
    batch = jax.eval_shape(lambda: jax.tree.map(lambda x: x[None], example_batch(model, tiles=10, length=length)))
    text = str(jax.make_jaxpr(make_train_step(model, stage()))(state, batch))
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text)}
    # The regular expression does find shapes: those of a table, and of all visual tokens.
    assert (words, model.language.hidden_size) in shapes and any(visual in shape for shape in shapes)
    assert not any({words, visual} <= set(shape) or {words, length} <= set(shape) for shape in shapes)


def test_the_text_only_step_trains_the_decoder_like_the_complete_step(params):
    config = dataclasses.replace(DESCENT, trainable=("language",))
    batch = random_batch(3, bins=2)
    batch["visual_index"][:] = -1  # no position takes a visual token
    state = create_state(config, params)
    complete, metrics = jitted(config)(state, batch)
    step = jax.jit(make_train_step(MODEL, config, is_text_only=True))
    alone, text_metrics = step(without_images(state), {name: batch[name] for name in TEXT_FIELDS})
    assert alone.params.keys() == {"language"} and text_metrics["tiles"] == 0
    np.testing.assert_allclose(text_metrics["loss"], metrics["loss"], rtol=1e-6)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6),
        alone.params["language"],
        complete.params["language"],
    )


@pytest.mark.parametrize(("trainable", "products"), [(("connector", "language"), 3), (("connector",), 2), ((), 1)])
def test_the_head_takes_a_product_for_the_loss_and_one_for_each_gradient(trainable, products):
    # No other array has an axis of 711.
    language = dataclasses.replace(MODEL.language, vocab_size=711, num_layers=1, tie_word_embeddings=False)
    model = AlignVLMConfig(dataclasses.replace(MODEL.vision, num_layers=1), MLPConfig(), language)
    params = nn.unbox(parameter_shapes(model))
    batch = random_batch(0, model=model)
    if trainable:
        config = stage(trainable=trainable)
        state = jax.eval_shape(lambda params: create_state(config, params), params)
        jaxpr = jax.make_jaxpr(make_train_step(model, config))(state, batch)
    else:
        evaluate = functools.partial(AlignVLM(model).apply, method="loss")
        jaxpr = jax.make_jaxpr(evaluate)({"params": params}, jax.tree.map(lambda field: field[0], batch))
    assert sum(711 in _sizes(equation) for equation in _matrix_products(jaxpr.jaxpr)) == products


def _matrix_products(jaxpr):
    """Yields the matrix products of a jaxpr, also those inside of loops and functions."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _matrix_products(getattr(inner, "jaxpr", inner))


def _sizes(equation) -> set[int]:
    return {size for variable in (*equation.invars, *equation.outvars) for size in variable.aval.shape}


def test_muons_momentum_is_sharded_like_its_weights():
    config = stage(optimizer=OptimizerConfig("muon"))
    abstract = abstract_state(MODEL, config, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    momentum = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.opt_state)
        if ".mu[" in jax.tree_util.keystr(path)
    }
    assert len(momentum) == len(jax.tree.leaves(abstract.params)), "each weight has one momentum, Muon's or Adam's"
    for path, weight in jax.tree_util.tree_leaves_with_path(abstract.params):
        (leaf,) = (leaf for name, leaf in momentum.items() if name.endswith(f".mu{jax.tree_util.keystr(path)}"))
        assert leaf.sharding == weight.sharding


def assert_is_sharded(state):
    """Asserts that weights and moments are still sharded over the 2x2x2 mesh after training."""
    embedding = state.params["language"]["embedding"]
    assert embedding.sharding.spec == jax.P("tensor", "fsdp")
    assert embedding.addressable_shards[0].data.shape == (24, 8)
    down = state.params["language"]["layers"]["mlp"]["down"]["kernel"]
    assert down.sharding.spec == jax.P(None, "tensor", "fsdp")
    assert down.addressable_shards[0].data.shape == (2, 16, 8)
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)):
        is_sharded = leaf.addressable_shards[0].data.size < leaf.size
        is_norm_or_counter = leaf.ndim <= 1 or "norm" in jax.tree_util.keystr(path)
        assert is_sharded or is_norm_or_counter or leaf.size <= 64, jax.tree_util.keystr(path)
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if jax.tree_util.keystr(path).endswith("['mlp']['down']['kernel']")
    ]
    assert moments and all(moment.sharding.spec == down.sharding.spec for moment in moments)


def test_a_changed_learning_rate_reuses_the_compiled_program(params):
    """A tuning trial, or a stage that differs only in its rates, uses a program from the compilation cache."""
    batch, mesh = random_batch(7), make_mesh(MeshConfig(1, 1, 1), devices=jax.devices()[:1])
    texts, moved = [], []
    for rate in (1e-3, 2e-3):
        config = stage(learning_rates=LearningRates(rate, rate, rate))
        with jax.set_mesh(mesh):
            step = jit_train_step(MODEL, config, mesh)
            texts.append(step.lower(abstract_state(MODEL, config, mesh), batch).as_text())
        state, _ = run(config, params, [batch])
        moved.append(optax.tree.norm(jax.tree.map(jnp.subtract, state.params, params)))
    assert texts[0] == texts[1]
    np.testing.assert_allclose(moved[1] / moved[0], 2, rtol=0.05)
