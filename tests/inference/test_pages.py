"""Tests of prompts that share a page: how they are grouped and batched, their scores, their answers, and the cache."""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.data.resampling import Resampling
from alignvlm_jax.inference import pages
from alignvlm_jax.inference.generate import DecodingOptions, Generator, decode_branches, read_pages
from alignvlm_jax.inference.pages import Group, PageBatch, group_prompts, plan_batches
from alignvlm_jax.inference.prompts import Prompt
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, random_parameters, tokens_per_tile
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
    # Larger weights than those of a new model, so that the answers depend on the prompt.
    return jax.jit(lambda rng: jax.tree.map(lambda leaf: leaf * 4, random_parameters(JOINED, rng)))(jax.random.key(0))


def page_prompts(seed: int, num_tiles: int, texts, *, joined: bool = False) -> list[Prompt]:
    """Returns prompts about one page of random tiles, each with one of the texts after it."""
    rng = np.random.default_rng(seed)
    visual = num_tiles * tokens_per_tile(CONFIG)
    tiles = rng.integers(0, 256, (num_tiles, 16, 16, 3)).astype(np.uint8)
    valid_hw = np.full((num_tiles, 2), 16, np.int32)
    sources = rng.integers(-1, visual, (visual, 4)).astype(np.int32)
    resampling = Resampling(sources, rng.random((visual, 4)).astype(np.float32) / 2) if joined else None
    return [
        Prompt(
            tokens=np.concatenate([[2], np.full(visual, 3), text]).astype(np.int32),
            visual_index=np.concatenate([[-1], np.arange(visual), np.full(len(text), -1)]).astype(np.int32),
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
    page, other = 1 + 8 + 3, 1 + 4 + 3
    assert shared(PROMPTS) == sorted([(by_length, page), ((1, 2), other), ((4,), len(SINGLE[0].tokens)), ((8, 9), 4)])


def test_every_prompt_keeps_a_token_of_its_own():
    same = [PAGE[0], PAGE[0]]
    assert shared(same) == [((0, 1), len(PAGE[0].tokens) - 1)]
    longer = dataclasses.replace(
        PAGE[0], tokens=np.append(PAGE[0].tokens, 5), visual_index=np.append(PAGE[0].visual_index, -1)
    )
    assert shared([longer, PAGE[0]]) == [((1, 0), len(PAGE[0].tokens) - 1)]
    # No token after the images.
    ends = [dataclasses.replace(one, tokens=one.tokens[:9], visual_index=one.visual_index[:9]) for one in same]
    assert shared(ends) == [((0,), 9), ((1,), 9)]


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
        dict(tokens=np.where(np.arange(len(PAGE[1].tokens)) == 0, 7, PAGE[1].tokens)),
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


def branch_logits(config, variables, prompts, layers=None):
    """Returns the scores after each of the prompts of one page."""
    (group,) = group_prompts(prompts)
    batch = PageBatch((group,), 2, 8)  # with a page and rows of padding
    options = dict(pad_id=PAD)
    page_rows = pages.pad_pages(prompts, batch, tile_size=16, **options)
    page = read_pages(AlignVLM(config), variables, page_rows, layers)
    rows = pages.pad_branches(prompts, batch, [group.prompts], **options)
    cache = empty_cache(config.language, len(rows["tokens"]), rows["tokens"].shape[1] + 2)
    if layers is not None:
        variables, cache = with_layers(variables, layers), cache.unstack()
    run = jax.jit(lambda *inputs: AlignVLM(config).apply(*inputs, method="prefill_branches"))
    logits, cache = run(variables, rows, cache.replace(page=page))
    scores = np.zeros((len(prompts), logits.shape[1]))
    scores[list(group.prompts)] = logits[: len(prompts)]
    return scores


def reference_logits(config, variables, prompts):
    """Returns the scores after each prompt, from a pass over it alone."""
    score, scores = jax.jit(AlignVLM(config).apply), []
    for one in prompts:
        batch = pages.pad_prompts([one], rows=1, tile_size=16, pad_id=PAD)
        scores.append(score(variables, batch).logits[0, len(one.tokens) - 1])
    return np.stack(scores)


@pytest.mark.parametrize("form", ["unstacked", "joined tiles"])
def test_scores_are_those_of_each_prompt_alone(params, form):
    config = JOINED if form == "joined tiles" else CONFIG
    prompts = page_prompts(5, 2, texts(5, 5, 9, 1, 30), joined=form == "joined tiles")
    # The weights of a new model: larger ones amplify rounding errors.
    variables = generator(jax.tree.map(lambda leaf: leaf / 4, params), config=config).variables
    layers = unstack_layers(variables) if form == "unstacked" else None
    expected = reference_logits(config, variables, prompts)
    np.testing.assert_allclose(branch_logits(config, variables, prompts, layers), expected, rtol=1e-5, atol=1e-5)


# The cache.


def test_the_page_is_stored_once_and_never_copied_for_its_branches(params):
    variables = generator(params).variables
    prompts = page_prompts(6, 8, texts(6, *[4] * 8))
    (group,) = group_prompts(prompts)
    batch = PageBatch((group,), 1, 8)
    page_rows = pages.pad_pages(prompts, batch, tile_size=16, pad_id=PAD)
    page = read_pages(AlignVLM(CONFIG), variables, page_rows, None)
    layers, groups, width, slots = 2, CONFIG.language.num_kv_heads, CONFIG.language.head_width, 48
    assert page.keys.shape == (layers, 1, groups, width, slots) and page.values.shape == (
        layers,
        1,
        groups,
        slots,
        width,
    )
    rows = pages.pad_branches(prompts, batch, [group.prompts], pad_id=PAD)
    options = DecodingOptions(MAX_NEW, (END,), PAD)
    text = decode_branches.lower(AlignVLM(CONFIG), variables, page, rows, None, options).compile().as_text()
    # The largest array with the slots of a page holds scores, or the page itself.
    sizes = [
        np.prod([int(n) for n in dims.split(",")])
        for dims in set(re.findall(r"f32\[([\d,]+)\]", text))
        if str(slots) in dims.split(",")
    ]
    scores = 8 * CONFIG.language.num_heads * 16 * slots
    assert page.keys.size < max(sizes) <= scores
    assert not re.findall(rf"f32\[[\d,]*\b{slots}\b[\d,]*\]\S* gather\(", text)


# Answers.


def generator(params, config=CONFIG, **options):
    return Generator(config, params, end_ids=(END,), pad_id=PAD, **{"batch_size": 32, **options})


def assert_same_answers(ours, prompts):
    """Compares with every prompt as its own page, in one batch."""
    alone = copy.copy(ours)
    alone.batch_size = len(prompts) * prompts[0].num_views
    counts = []
    answers = ours.generate(prompts, MAX_NEW, on_batch=counts.append)
    assert sum(counts) == len(prompts)
    for answer, reference in zip(answers, alone.generate(prompts, MAX_NEW, share_pages=False), strict=True):
        np.testing.assert_array_equal(answer, reference)
    assert len({tuple(answer) for answer in answers}) > len(prompts) // 2, "the answers should differ"
    return answers


def test_answers_are_the_same_in_any_order(params):
    ours = generator(params)
    answers = assert_same_answers(ours, PROMPTS)
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    for i, answer in zip(order, ours.generate([PROMPTS[i] for i in order], MAX_NEW), strict=True):
        np.testing.assert_array_equal(answer, answers[i])


def test_views_and_rounds(params):
    views = np.random.default_rng(9).integers(0, 256, (2, *PAGE[0].tiles.shape)).astype(np.uint8)
    # Twelve rows are four branches of a page with three views, so the five prompts take two rounds.
    assert_same_answers(generator(params, batch_size=12), [dataclasses.replace(one, other_views=views) for one in PAGE])


def test_noise_on_the_features(params):
    noisy, other = (generator(params).with_feature_noise(2.0, seed) for seed in (1, 2))
    answers = assert_same_answers(noisy, PAGE)
    assert any(list(a) != list(b) for a, b in zip(answers, other.generate(PAGE, MAX_NEW), strict=True))


def test_a_mesh_with_more_shards_than_pages(params):
    mesh = make_mesh(MeshConfig(2, 2, 2))
    placed = jax.device_put(jax.tree.map(jnp.asarray, params), parameter_shardings(params, mesh))
    prompts, answers = [*PAGE, *OTHER], generator(params).generate(PROMPTS, MAX_NEW)
    expected = [answers[i] for i in (0, 3, 5, 6, 7, 1, 2)]
    for answer, reference in zip(generator(placed, mesh=mesh).generate(prompts, MAX_NEW), expected, strict=True):
        np.testing.assert_array_equal(answer, reference)
