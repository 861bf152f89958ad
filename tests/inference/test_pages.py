"""Tests of prompts that share a page: how they are grouped and batched, their scores, their answers, and the cache."""

import dataclasses
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.data.resampling import Resampling
from alignvlm_jax.inference import pages
from alignvlm_jax.inference.generate import DecodingOptions, Generator, decode_branches, read_pages
from alignvlm_jax.inference.pages import Group, PageBatch, group_prompts, plan_batches
from alignvlm_jax.inference.prompts import Prompt
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, parameter_shapes, tokens_per_tile
from alignvlm_jax.models.connectors import AlignConfig
from alignvlm_jax.models.language import empty_cache
from alignvlm_jax.models.unstacking import unstack_layers, with_layers
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.parallel.sharding import parameter_shardings
from tests.tiny_models import tiny_language, tiny_vision

CONFIG = AlignVLMConfig(
    vision=tiny_vision(),
    connector=AlignConfig(vocab_scale_init=8.0),
    language=tiny_language(48, rope_theta=1e4, tie_word_embeddings=True, max_position_embeddings=512),
)
JOINED = dataclasses.replace(CONFIG, newline=True)
END, PAD, MAX_NEW = 1, 0, 6


@pytest.fixture(scope="module")
def params():
    """Random weights, larger than those of a new model, so that the answers depend on the prompt."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "newline" or leaf.ndim > 1:
            return jnp.asarray(
                rng.normal(size=leaf.shape) * 4 * leaf.shape[-2 if leaf.ndim > 1 else 0] ** -0.5, leaf.dtype
            )
        return jnp.full(leaf.shape, "scale" in path[-1].key, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(parameter_shapes(JOINED)))


def page_prompts(seed: int, num_tiles: int, texts, *, joined: bool = False) -> list[Prompt]:
    """Returns prompts about two images of random tiles, each with one of the texts after them."""
    rng = np.random.default_rng(seed)
    visual = num_tiles * tokens_per_tile(CONFIG)
    tiles = rng.integers(0, 256, (num_tiles, 16, 16, 3)).astype(np.uint8)
    valid_hw = np.full((num_tiles, 2), 16, np.int32)
    sources = rng.integers(-1, visual, (visual, 4)).astype(np.int32)
    resampling = Resampling(sources, rng.random((visual, 4)).astype(np.float32) / 2) if joined else None
    # The begin token, an image, a word, and another image.
    index = np.concatenate([[-1], np.arange(4), [-1], np.arange(4, visual)]) if visual else np.array([-1])
    return [
        Prompt(
            tokens=np.concatenate([np.where(index < 0, 2, 3), text]).astype(np.int32),
            visual_index=np.concatenate([index, np.full(len(text), -1)]).astype(np.int32),
            tiles=tiles,
            tile_valid_hw=valid_hw,
            resampling=resampling,
        )
        for text in texts
    ]


def texts(seed: int, *lengths: int) -> list[np.ndarray]:
    """Returns random texts that all begin with the same three tokens, such as an earlier turn."""
    rng = np.random.default_rng(seed)
    start = rng.integers(4, 48, 3)
    return [np.concatenate([start, rng.integers(4, 48, length)]) for length in lengths]


PAGE = page_prompts(0, 2, texts(0, 5, 9, 2, 12, 7))
OTHER = page_prompts(1, 1, texts(1, 3, 8))
SINGLE = page_prompts(2, 3, texts(2, 4))
NO_IMAGE = page_prompts(3, 0, texts(3, 1, 2))
PROMPTS = [PAGE[0], *OTHER, PAGE[1], *SINGLE, *PAGE[2:], *NO_IMAGE]


def shared(prompts) -> list[tuple]:
    return sorted((group.prompts, group.page_length) for group in group_prompts(prompts))


# Which prompts share a page.


def test_a_page_is_the_common_beginning_of_its_prompts():
    by_length = tuple(sorted((0, 3, 5, 6, 7), key=lambda i: len(PROMPTS[i].tokens)))
    page, other = 2 + 8 + 3, 2 + 4 + 3
    assert shared(PROMPTS) == sorted([(by_length, page), ((1, 2), other), ((4,), len(SINGLE[0].tokens)), ((8, 9), 4)])


def test_every_prompt_keeps_a_token_of_its_own():
    same = [PAGE[0], PAGE[0]]
    assert shared(same) == [((0, 1), len(PAGE[0].tokens) - 1)]
    longer = dataclasses.replace(
        PAGE[0], tokens=np.append(PAGE[0].tokens, 5), visual_index=np.append(PAGE[0].visual_index, -1)
    )
    assert shared([longer, PAGE[0]]) == [((1, 0), len(PAGE[0].tokens) - 1)]
    # No token after the images.
    ends = [dataclasses.replace(one, tokens=one.tokens[:10], visual_index=one.visual_index[:10]) for one in same]
    assert shared(ends) == [((0,), 10), ((1,), 10)]


def test_equal_content_is_shared_and_different_content_is_not():
    copied = dataclasses.replace(PAGE[1], tiles=PAGE[1].tiles.copy(), tile_valid_hw=PAGE[1].tile_valid_hw.copy())
    assert len(shared([PAGE[0], copied])) == 1
    pixels = PAGE[1].tiles.copy()
    pixels[-1, -1, -1, -1] ^= 1
    views = np.stack([PAGE[1].tiles] * 2)
    different = [
        dict(tiles=pixels),
        dict(tile_valid_hw=PAGE[1].tile_valid_hw - 1),
        dict(other_views=views),
        dict(tokens=np.where(np.arange(len(PAGE[1].tokens)) == 5, 7, PAGE[1].tokens)),  # between the images
        dict(resampling=page_prompts(0, 2, texts(0, 5), joined=True)[0].resampling),
    ]
    for changes in different:
        assert len(shared([PAGE[0], dataclasses.replace(PAGE[1], **changes)])) == 2, list(changes)


def test_a_digest_is_computed_once_per_array(monkeypatch):
    calls = []
    sha256 = pages.hashlib.sha256
    monkeypatch.setattr(pages.hashlib, "sha256", lambda content: calls.append(content) or sha256(content))
    group_prompts(PAGE)
    assert len(calls) == 2 + len(PAGE), "the tiles, their valid parts, and the tokens of every prompt"


def test_texts_without_much_in_common_are_not_shared():
    assert len(shared(page_prompts(3, 0, texts(3, 3, 20)))) == 2


# Batches.


def batches_of(counts, batch_size=32, shards=1, views=1):
    """Plans batches for pages with these numbers of prompts."""
    prompts, groups = [], []
    for count in counts:
        start = len(prompts)
        prompts += [PAGE[0]] * count
        groups.append(Group(tuple(range(start, start + count)), 12))
    if views > 1:
        prompts = [dataclasses.replace(PAGE[0], other_views=np.stack([PAGE[0].tiles] * (views - 1)))] * len(prompts)
    plan = plan_batches(prompts, groups, batch_size=batch_size, shards=shards)
    answered = [i for batch in plan for group in batch.groups for i in group.prompts]
    assert sorted(answered) == list(range(len(prompts)))
    for batch in plan:
        assert len(batch.groups) <= batch.num_pages and batch.num_pages % shards == 0
        if batch.num_branches:
            rounds = [i for of_pages in batch.rounds() for indices in of_pages for i in indices]
            assert sorted(rounds) == sorted(i for group in batch.groups for i in group.prompts)
    return [(batch.num_pages, batch.num_branches, len(batch.groups)) for batch in plan]


def test_pages_times_branches_fit_a_batch():
    assert batches_of([16] * 4) == [(2, 16, 2), (2, 16, 2)]
    assert batches_of([4] * 8 + [3] * 10) == [(8, 4, 8), (10, 3, 10)]
    assert batches_of([1] * 40) == [(32, 0, 32), (8, 0, 8)]
    assert batches_of([5, 2, 1]) == [(1, 0, 1), (2, 6, 2)]
    assert batches_of([4, 4], views=2, batch_size=8) == [(1, 4, 1)] * 2


def test_a_page_with_many_branches_is_read_once_and_has_rounds_of_equal_size():
    assert batches_of([40]) == [(1, 24, 1)]
    (batch,) = plan_batches([PAGE[0]] * 40, [Group(tuple(range(40)), 12)], batch_size=32)
    assert [len(indices) for (indices,) in batch.rounds()] == [24, 16]


def test_a_group_is_split_so_that_every_shard_has_work():
    assert batches_of([16], shards=4) == [(4, 4, 4)]
    assert batches_of([3], shards=4) == [(4, 1, 3)]
    assert batches_of([16] * 5, shards=4, batch_size=64) == [(4, 16, 4), (4, 4, 4)]
    assert batches_of([40] * 4, shards=4) == [(4, 8, 4)], "rounds, since every shard has a page"


# Scores.


def branch_logits(variables, prompts, batch):
    """Returns the scores after each of the prompts of one page."""
    layers = unstack_layers(variables)
    page = read_pages(AlignVLM(JOINED), variables, pages.pad_pages(prompts, batch, tile_size=16, pad_id=PAD), layers)
    rows = pages.pad_branches(prompts, batch, next(batch.rounds()), pad_id=PAD)
    cache = empty_cache(JOINED.language, len(rows["tokens"]), rows["tokens"].shape[1] + 2).unstack()
    run = jax.jit(lambda *inputs: AlignVLM(JOINED).apply(*inputs, method="prefill_branches"))
    logits, _ = run(with_layers(variables, layers), rows, cache.replace(page=page))
    scores = np.zeros((len(prompts), logits.shape[1]))
    scores[list(batch.groups[0].prompts)] = logits[: len(prompts)]
    return scores


def test_scores_are_those_of_each_prompt_alone(params):
    prompts = page_prompts(5, 2, texts(5, 5, 9, 1, 30), joined=True)
    # The weights of a new model: larger ones amplify rounding errors.
    variables = generator(jax.tree.map(lambda leaf: leaf / 4, params), config=JOINED).variables
    score, expected = jax.jit(AlignVLM(JOINED).apply), []
    for one in prompts:
        row = pages.pad_prompts([one], rows=1, tile_size=16, pad_id=PAD)
        expected.append(score(variables, row).logits[0, len(one.tokens) - 1])
    batch = PageBatch(tuple(group_prompts(prompts)), 2, 8)  # with a page and rows of padding
    np.testing.assert_allclose(branch_logits(variables, prompts, batch), np.stack(expected), rtol=1e-5, atol=1e-5)


# The cache.


def test_the_page_is_stored_once_and_never_copied_for_its_branches(params):
    model, variables = AlignVLM(CONFIG), generator(params).variables
    prompts = page_prompts(6, 8, texts(6, *[9] * 6))
    batch = PageBatch(tuple(group_prompts(prompts)), 1, 6)
    page_rows = pages.pad_pages(prompts, batch, tile_size=16, pad_id=PAD)
    page = jax.eval_shape(lambda: read_pages(model, variables, page_rows, None))
    layers, groups, width, slots = 2, 2, 8, 48
    assert page.keys.shape == (layers, 1, groups, width, slots) and page.values.shape == (
        layers,
        1,
        groups,
        slots,
        width,
    )
    rows = pages.pad_branches(prompts, batch, next(batch.rounds()), pad_id=PAD)
    options = DecodingOptions(MAX_NEW, (END,), PAD)
    text = decode_branches.lower(model, variables, page, rows, None, options).compile().as_text()
    # No array of keys or values is larger than the page: those for six rows would be, even of one layer.
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    sizes = [math.prod(shape) for shape in shapes if {slots, width} <= set(shape)]
    assert max(sizes) == page.keys.size < 6 * page.keys.size // layers
    scores = [math.prod(shape) for shape in shapes if slots in shape and width not in shape]
    assert max(scores) == rows["tokens"].size * CONFIG.language.num_heads * slots


# Answers.


def generator(params, config=CONFIG, **options):
    return Generator(config, params, end_ids=(END,), pad_id=PAD, **{"batch_size": 32, **options})


def assert_same_answers(ours, prompts, alone):
    """Compares with every prompt as its own page, in one batch."""
    alone.batch_size = len(prompts) * prompts[0].num_views
    counts = []
    answers = ours.generate(prompts, MAX_NEW, on_batch=counts.append)
    assert sum(counts) == len(prompts)
    for answer, reference in zip(answers, alone.generate(prompts, MAX_NEW, share_pages=False), strict=True):
        np.testing.assert_array_equal(answer, reference)
    assert len({tuple(answer) for answer in answers}) > len(prompts) // 2, "the answers should differ"
    return answers


def noisy(params, seed, **options):
    return generator(params, **options).with_feature_noise(1.0, seed)


@pytest.fixture(scope="module")
def answers(params):
    return assert_same_answers(noisy(params, seed=1), PROMPTS, alone=noisy(params, seed=1))


def test_answers_do_not_depend_on_the_order(params, answers):
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    again = noisy(params, seed=1).generate([PROMPTS[i] for i in order], MAX_NEW)
    assert [list(answer) for answer in again] == [list(answers[i]) for i in order]


def test_noise_on_the_features(params, answers):
    other = noisy(params, seed=2).generate(PROMPTS, MAX_NEW)
    assert [list(answer) for answer in other] != [list(answer) for answer in answers]


def test_views_and_rounds_on_a_mesh_with_more_shards_than_pages(params):
    prompts = [*page_prompts(0, 2, texts(0, *range(1, 13))), *OTHER]
    # The second view of both pages: the first one upside down.
    prompts = [dataclasses.replace(one, other_views=one.tiles[None, :, ::-1].copy()) for one in prompts]
    # Two pages for four shards: the first is split into parts of 3, 3 and 6 prompts. With two views, 16 rows are four
    # pages of two branches, so there are three rounds.
    (batch,) = plan_batches(prompts, group_prompts(prompts), batch_size=16, shards=4)
    assert (batch.num_pages, batch.num_branches, len(list(batch.rounds()))) == (4, 2, 3)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    placed = jax.device_put(params, parameter_shardings(parameter_shapes(JOINED), mesh))
    assert_same_answers(generator(placed, mesh=mesh, batch_size=16), prompts, alone=generator(params))
