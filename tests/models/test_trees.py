"""Trees through the whole model: the loss of a branch, in value and gradient, is that of its example alone."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from alignvlm_jax.models.alignvlm import AlignVLM, random_parameters, tokens_per_tile
from alignvlm_jax.ops import attention, attention_tokamax
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training.train_step import batch_fields, create_state, make_train_step
from tests.training import batches

LENGTH, TILES = 48, 2
MODEL = dataclasses.replace(
    batches.MODEL,
    vision=dataclasses.replace(batches.MODEL.vision, num_layers=1),
    language=dataclasses.replace(batches.MODEL.language, num_heads=4, num_kv_heads=2),
)
SIDE, PER_TILE = MODEL.vision.image_size, tokens_per_tile(MODEL)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: nn.unbox(random_parameters(MODEL, jax.random.key(0))))()


def _random_tree(rng, num_branches):
    """Returns an image, the page's number of tokens, and the branches' tokens with the lengths of their questions."""
    image = rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    branches = [rng.integers(1, 40, rng.integers(3, 7)) for _ in range(num_branches)]
    return image, rng.integers(1, 40, PER_TILE + 2), branches


def _row(trees):
    """Returns the packed row of trees; those of one branch are ordinary examples."""
    row = {name: np.zeros(LENGTH, np.int32) for name in ("tokens", "targets", "segment_ids", "branch_ids", "positions")}
    row |= {"loss_weights": np.zeros(LENGTH, np.float32), "visual_index": np.full(LENGTH, -1, np.int32)}
    row["tiles"] = np.zeros((TILES, SIDE, SIDE, 3), np.uint8)
    row["tile_valid_hw"] = np.zeros((TILES, 2), np.int32)
    start = 0
    for segment, (image, page, branches) in enumerate(trees, start=1):
        row["tiles"][segment - 1], row["tile_valid_hw"][segment - 1] = image, SIDE
        row["visual_index"][start + 1 : start + 1 + PER_TILE] = np.arange(PER_TILE) + PER_TILE * (segment - 1)
        row["tokens"][start : start + len(page)] = page
        row["positions"][start : start + len(page)] = np.arange(len(page))
        stop = start + len(page)
        for number, tokens in enumerate(branches, start=1):
            span = slice(stop, stop + len(tokens))
            row["tokens"][span], row["targets"][span] = tokens, np.append(tokens[1:], 0)
            row["positions"][span] = len(page) + np.arange(len(tokens))
            # The first token of a branch is its question.
            row["loss_weights"][span] = np.append(np.ones(len(tokens) - 1), 0)
            row["branch_ids"][span] = number if len(branches) > 1 else 0
            stop = span.stop
        row["segment_ids"][start:stop] = segment
        start = stop
    return row


def _stack(rows):
    return {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}


def _alone(trees):
    """Returns a row for each branch, with the page before it and no field for branches."""
    rows = [_row([(image, page, [branch])]) for image, page, branches in trees for branch in branches]
    return [{name: field for name, field in row.items() if name != "branch_ids"} for row in rows]


def _gradient(params, batch, model=MODEL, branch_tokens=None):
    def loss(params):
        return AlignVLM(model).apply({"params": params}, batch, branch_tokens, method="loss").loss

    value, gradient = jax.value_and_grad(loss)(params)
    return value, ravel_pytree(gradient)[0]


_row_gradient = jax.jit(_gradient)


def _check(got, expected):
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    assert np.linalg.norm(got[1] - expected[1]) <= 1e-5 * np.linalg.norm(expected[1])


def test_each_branch_has_the_loss_and_gradient_of_its_example_alone(params):
    rng = np.random.default_rng(0)
    trees = [_random_tree(rng, 3), _random_tree(rng, 1)]
    row = _row(trees)
    for number, alone in enumerate(_alone(trees[:1]), start=1):
        is_branch = (row["segment_ids"] == 1) & (row["branch_ids"] == number)
        weights = np.where(is_branch, row["loss_weights"], 0)
        _check(
            _row_gradient(params, _stack([{**row, "loss_weights": weights}])), _row_gradient(params, _stack([alone]))
        )


def test_sharded_rows_with_gathered_branches_have_the_loss_of_their_examples(params, monkeypatch):
    """Trees on 8 devices, with a kernel that gathers branches, and their examples alone on one device."""
    monkeypatch.setattr(attention_tokamax, "attend", functools.partial(attention_tokamax.attend, interpret=True))
    monkeypatch.setattr(attention, "_obstacle", lambda *args: None)
    model = dataclasses.replace(MODEL, language=dataclasses.replace(MODEL.language, attention="tokamax"))
    rng = np.random.default_rng(1)
    trees = [[_random_tree(rng, 3), _random_tree(rng, 1)] for _ in range(4)]
    batch = _stack([_row(row_trees) for row_trees in trees])
    budget = int((batch["branch_ids"] > 0).sum(axis=1).max())
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))), sharding.logical_rules():
        placed = jax.device_put(batch, jax.P(("data", "fsdp")))
        got = jax.jit(functools.partial(_gradient, model=model, branch_tokens=budget))(params, placed)
    alone = [_row_gradient(params, _stack([row])) for row_trees in trees for row in _alone(row_trees)]
    _check(got, [np.sum(np.asarray(parts, np.float64), axis=0) for parts in zip(*alone, strict=True)])


def test_without_the_field_the_step_is_the_same_program():
    config, batch = batches.stage(), batches.random_batch(0)
    state = jax.eval_shape(lambda: create_state(config, nn.unbox(random_parameters(batches.MODEL, jax.random.key(0)))))
    texts = {
        str(jax.make_jaxpr(make_train_step(batches.MODEL, config, branch_tokens=n))(state, batch)) for n in (None, 7)
    }
    assert len(texts) == 1


def test_the_batch_has_the_field_with_trees_only():
    assert set(batch_fields(MODEL, is_tree=True)) - set(batch_fields(MODEL)) == {"branch_ids"}
