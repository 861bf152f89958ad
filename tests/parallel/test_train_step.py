"""The train step on meshes: where its arrays are placed, what is gathered, and the same loss on every mesh."""

import dataclasses
import itertools
import math
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from alignvlm_jax.models.alignvlm import AlignVLM, random_parameters, tokens_per_tile
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training.train_step import abstract_state, jit_train_step, place_state
from tests.training import batches

# Sizes that identify their arrays in compiled code: no other array has an axis of these lengths.
WORDS, WIDTH, INNER = 704, 40, 144
MODEL = dataclasses.replace(
    batches.MODEL,
    vision=dataclasses.replace(batches.MODEL.vision, hidden_size=24, intermediate_size=112),
    language=dataclasses.replace(
        batches.MODEL.language,
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_heads=4,
        num_kv_heads=2,
        tie_word_embeddings=False,
    ),
)
STAGE = batches.stage()


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def compiled(mesh):
    """The compiled train step of 8 bins, and the abstract state that it was compiled for."""
    state = abstract_state(MODEL, STAGE, mesh)
    batch_sharding = NamedSharding(mesh, sharding.BATCH_SPEC)
    batch = {
        name: jax.ShapeDtypeStruct(field.shape, field.dtype, sharding=batch_sharding)
        for name, field in batches.random_batch(0, model=MODEL).items()
    }
    with jax.set_mesh(mesh):
        return jit_train_step(MODEL, STAGE, mesh).lower(state, batch).compile(), state


def test_the_step_keeps_the_shardings_of_weights_and_optimizer(compiled, mesh):
    step, state = compiled
    outputs, (inputs, _) = step.output_shardings[0], step.input_shardings[0]
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), after, before in zip(leaves, jax.tree.leaves(outputs), jax.tree.leaves(inputs), strict=True):
        assert after.is_equivalent_to(leaf.sharding, leaf.ndim), jax.tree_util.keystr(path)
        assert before.is_equivalent_to(leaf.sharding, leaf.ndim), jax.tree_util.keystr(path)
    expected = {
        "['language']['embedding']": (WORDS // 2, WIDTH // 2),
        "['language']['lm_head']": (WORDS // 2, WIDTH // 2),
        "['connector']['w2']": (WORDS // 2, WIDTH // 2),
        "['language']['layers']['mlp']['gate']['kernel']": (2, WIDTH // 2, INNER // 2),
        "['language']['layers']['mlp']['down']['kernel']": (2, INNER // 2, WIDTH // 2),
        "['language']['layers']['attention']['query']['kernel']": (2, WIDTH // 2, WIDTH // 2),
    }
    for ending, shape in expected.items():
        matches = [leaf for path, leaf in leaves if jax.tree_util.keystr(path).endswith(ending)]
        assert len(matches) == 3, f"{ending}: the weight and its two moments"
        assert all(leaf.sharding.shard_shape(leaf.shape) == shape for leaf in matches), ending


def test_no_device_holds_a_complete_vocabulary_table(compiled):
    text = compiled[0].as_text()
    shapes = {_shape(shape) for shape in re.findall(r"\w+\[([\d,]+)\]", text)}
    assert (WORDS // 2, WIDTH // 2) in shapes, "each device holds its part of a table"
    assert not any(WORDS in shape for shape in shapes), "a table was gathered over tensor"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mesh_setting_reaches_all_tables(mesh, dtype):
    # The tiny model computes in float32 on a CPU, so bfloat16 appears only where gradients are exchanged.
    state = abstract_state(MODEL, STAGE, mesh)
    batch = {
        name: jax.ShapeDtypeStruct(field.shape, field.dtype)
        for name, field in batches.random_batch(0, model=MODEL).items()
    }
    with jax.set_mesh(mesh):
        step = jit_train_step(MODEL, STAGE, mesh, gradient_dtype=dtype)
        text = str(step.trace(state, batch).jaxpr)
    # Embedding, LM head, W2, and E_text in the connector; each over fsdp, and over data.
    exchanged = re.findall(r"bf16\[[\d,]*\] = (?:reduce_scatter|psum)", text)
    assert len(exchanged) == (8 if dtype == "bfloat16" else 0), exchanged


def test_bins_stay_on_their_devices_from_pixels_to_loss(mesh):
    """Named activations are split over (data, fsdp) along rows, and MLPs and heads over tensor along their width."""
    model = AlignVLM(MODEL)
    params = abstract_state(MODEL, STAGE, mesh).params
    row_sharding = NamedSharding(mesh, jax.P(("data", "fsdp")))
    batch = jax.tree.map(
        lambda field: jax.ShapeDtypeStruct(field.shape[1:], field.dtype, sharding=row_sharding),
        batches.random_batch(0, model=MODEL),
    )

    def activations(params, batch):
        bound = model.bind({"params": params})
        visual, _ = bound.encode_images(batch["tiles"], batch["tile_valid_hw"])
        inputs = bound.merge(batch, visual)
        hidden, _ = bound.language(inputs, positions=batch["positions"], segment_ids=batch["segment_ids"])
        return {
            "encoder": bound.encode_features(batch["tiles"], batch["tile_valid_hw"]),
            "connector": visual,
            "decoder input": inputs,
            "decoder output": hidden,
            "logits": bound.language.logits(hidden),
        }

    with jax.set_mesh(mesh), sharding.logical_rules():
        compiled = jax.jit(activations).lower(params, batch).compile()
    shapes = jax.eval_shape(activations, params, batch)
    rows, length, tiles = 8, batches.LENGTH, batches.TILES
    visual = tokens_per_tile(MODEL)
    expected = {
        "encoder": (rows // 4 * tiles, visual, 24),
        "connector": (rows // 4, tiles * visual, WIDTH),
        "decoder input": (rows // 4, length, WIDTH),
        "decoder output": (rows // 4, length, WIDTH),
        "logits": (rows // 4, length, WORDS // 2),
    }
    local_shapes = {name: output.shard_shape(shapes[name].shape) for name, output in compiled.output_shardings.items()}
    assert local_shapes == expected
    # The MLP's inner activations have no name; they are found in the compiled text by their unusual width.
    held = {_shape(shape) for shape in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())}
    wide = {shape for shape in held if shape[-1] in (INNER, INNER // 2) and math.prod(shape[:-1]) == rows // 4 * length}
    assert wide and all(shape[-1] == INNER // 2 for shape in wide), "the inner width of an MLP is split over tensor"


SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(shape) == 8]


@pytest.mark.large
@pytest.mark.parametrize("shape", SHAPES)
def test_every_mesh_shape_gives_the_same_losses(shape, one_device):
    np.testing.assert_allclose(losses(make_mesh(MeshConfig(*shape))), one_device, rtol=1e-5)


@pytest.fixture(scope="module")
def one_device():
    return losses(make_mesh(MeshConfig(), jax.devices()[:1]))


def losses(mesh):
    """Returns the losses of three steps on the same batch; the second and third depend on the gradients."""
    params = nn.unbox(jax.jit(lambda: random_parameters(MODEL, jax.random.key(0)))())
    with jax.set_mesh(mesh):
        state = place_state(MODEL, STAGE, mesh, jax.device_get(params))
        step = jit_train_step(MODEL, STAGE, mesh)
        batch = sharding.shard_batch(batches.random_batch(0, model=MODEL), mesh)
        history = []
        for _ in range(3):
            state, metrics = step(state, batch)
            history.append(float(metrics["loss"]))
    assert history[2] < history[0]
    return np.array(history)


def _shape(text):
    return tuple(int(size) for size in text.split(",") if size)
