"""Tests of decoding: alone and in batches, against decoding without a cache, and with several views."""

import dataclasses

import jax
import numpy as np
import pytest

from alignvlm_jax.inference.generate import DecodingOptions, Generator, Prompt, greedy_decode, pad_prompts
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, random_parameters, tokens_per_tile
from alignvlm_jax.models.connectors import AlignConfig
from tests.tiny_models import tiny_language, tiny_vision

CONFIG = AlignVLMConfig(
    vision=tiny_vision(),
    connector=AlignConfig(vocab_scale_init=8.0),
    language=tiny_language(48, rope_theta=1e4, tie_word_embeddings=True, max_position_embeddings=512),
)
END, PAD = 1, 0


@pytest.fixture(scope="module")
def params():
    # Larger weights than those of a new model, so that the answers depend on the prompt.
    return jax.jit(lambda rng: jax.tree.map(lambda leaf: leaf * 4, random_parameters(CONFIG, rng)))(jax.random.key(0))


def prompt(seed: int, num_tiles: int, text_length: int) -> Prompt:
    """Returns a prompt of random tiles and random text after them."""
    rng = np.random.default_rng(seed)
    visual = num_tiles * tokens_per_tile(CONFIG)
    text = rng.integers(2, 48, text_length)
    return Prompt(
        tokens=np.concatenate([[2], np.full(visual, 3), text]).astype(np.int32),
        visual_index=np.concatenate([[-1], np.arange(visual), np.full(text_length, -1)]).astype(np.int32),
        tiles=rng.integers(0, 256, (num_tiles, 16, 16, 3)).astype(np.uint8),
        tile_valid_hw=np.full((num_tiles, 2), 16, np.int32),
    )


PROMPTS = [prompt(0, 1, 5), prompt(1, 2, 11), prompt(2, 0, 4)]
MAX_NEW = 8


def generator(params, end_ids=(END,)):
    return Generator(CONFIG, params, end_ids=end_ids, pad_id=PAD, batch_size=4)


def test_answers_are_the_same_in_a_batch_and_alone(params):
    together = generator(params).generate(PROMPTS, max_new_tokens=MAX_NEW)
    for one, answer in zip(PROMPTS, together, strict=True):
        np.testing.assert_array_equal(generator(params).generate([one], max_new_tokens=MAX_NEW)[0], answer)
    assert len({tuple(answer) for answer in together}) == len(PROMPTS), "the prompts should lead to different answers"


def test_cached_decoding_equals_one_pass_over_prompt_and_answer(params):
    one = PROMPTS[1]
    answer = generator(params, end_ids=()).generate([one], max_new_tokens=MAX_NEW)[0]
    batch = {
        "tokens": np.concatenate([one.tokens, answer])[None],
        "visual_index": np.concatenate([one.visual_index, np.full(len(answer), -1)])[None],
        "tiles": one.tiles[None],
        "tile_valid_hw": one.tile_valid_hw[None],
    }
    batch["segment_ids"] = np.ones_like(batch["tokens"])
    batch["positions"] = np.arange(batch["tokens"].shape[1])[None]
    scores = jax.jit(AlignVLM(CONFIG).apply)(generator(params).variables, batch).logits
    predicted = np.argmax(scores[0, len(one.tokens) - 1 : -1], axis=-1)
    np.testing.assert_array_equal(predicted, answer)


def with_random_views(one: Prompt, number: int) -> Prompt:
    """Returns the prompt with random further views, so that it has `number` of them."""
    other_views = np.random.default_rng(9).integers(0, 256, (number - 1, *one.tiles.shape)).astype(np.uint8)
    return dataclasses.replace(one, other_views=other_views)


def test_several_views_answer_with_the_most_likely_token_of_all_of_them(params):
    """Compares with a pass over everything for each token and view, in float64."""
    one = with_random_views(PROMPTS[1], 3)
    model, variables = AlignVLM(CONFIG), generator(params).variables
    apply, expected, single_view_tokens = jax.jit(model.apply), [], []
    for _ in range(MAX_NEW):
        log_p = []
        for view in one.views():
            tokens = np.concatenate([view.tokens, np.array(expected, np.int32)])
            batch = pad_prompts(
                [dataclasses.replace(view, tokens=tokens, visual_index=_extended_index(view, tokens))], **ROW
            )
            logits = np.asarray(apply(variables, batch).logits, np.float64)[0, len(tokens) - 1]
            log_p.append(logits - np.log(np.sum(np.exp(logits))))
        single_view_tokens.append([int(np.argmax(row)) for row in log_p])
        expected.append(int(np.argmax(np.mean(log_p, axis=0))))
    answer = generator(params, end_ids=()).generate([one], max_new_tokens=MAX_NEW)[0]
    assert answer.tolist() == expected
    assert any(len(set(tokens)) > 1 for tokens in single_view_tokens), "single views should disagree somewhere"


ROW = dict(rows=1, tile_size=16, pad_id=PAD)


def _extended_index(view: Prompt, tokens: np.ndarray) -> np.ndarray:
    """Returns the prompt's index of visual tokens, extended over decoded tokens."""
    return np.concatenate([view.visual_index, np.full(len(tokens) - len(view.tokens), -1, np.int32)])


def test_identical_views_do_not_change_answers(params):
    prompts = [dataclasses.replace(one, other_views=np.stack([one.tiles] * 2)) for one in PROMPTS]
    answers = generator(params).generate(prompts, max_new_tokens=MAX_NEW)
    for answer, expected in zip(answers, generator(params).generate(PROMPTS, max_new_tokens=MAX_NEW), strict=True):
        np.testing.assert_array_equal(answer, expected)


def test_prompts_with_one_and_several_views_are_answered_together(params):
    # The batch has 4 rows: fewer than needed, and not divisible by the 3 and 6 views.
    prompts = [
        with_random_views(PROMPTS[0], 3),
        PROMPTS[1],
        with_random_views(PROMPTS[1], 6),
        PROMPTS[2],
        with_random_views(PROMPTS[1], 3),
    ]
    num_answered = []
    together = generator(params).generate(prompts, max_new_tokens=MAX_NEW, on_batch=num_answered.append)
    for one, answer in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(generator(params).generate([one], max_new_tokens=MAX_NEW)[0], answer)
    assert sum(num_answered) == len(prompts)


def test_answers_stop_before_the_end_token(params):
    free = generator(params, end_ids=()).generate(PROMPTS, max_new_tokens=MAX_NEW)
    end = int(free[0][3])
    stopped = generator(params, end_ids=(end,)).generate(PROMPTS, max_new_tokens=MAX_NEW)
    for before, after in zip(free, stopped, strict=True):
        stop = list(before).index(end) if end in before else len(before)
        np.testing.assert_array_equal(after, before[:stop])


def test_rows_without_a_prompt_do_not_keep_the_loop_running(params):
    batch = pad_prompts(PROMPTS[:1], rows=2, tile_size=16, pad_id=PAD)
    variables, every_id = generator(params).variables, tuple(range(48))
    answers = greedy_decode(AlignVLM(CONFIG), variables, batch, None, DecodingOptions(MAX_NEW, every_id, PAD))
    assert np.asarray(answers)[1].tolist() == [PAD] * MAX_NEW
    assert np.asarray(answers)[0, 1:].tolist() == [PAD] * (MAX_NEW - 1)


def test_lengths_and_tiles_are_rounded_up_to_a_few_shapes():
    batches = [pad_prompts([prompt(0, *size)], rows=4, tile_size=16, pad_id=PAD) for size in [(0, 3), (1, 9), (3, 70)]]
    assert [batch["tokens"].shape for batch in batches] == [(4, 64), (4, 64), (4, 128)]
    assert [batch["tiles"].shape[1] for batch in batches] == [1, 1, 4]
