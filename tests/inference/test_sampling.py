"""Sampling: the filters equal transformers', draws have the right distribution and depend on their own row alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from transformers.generation import logits_process

from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import sampling
from alignvlm_jax.inference.sampling import SamplingOptions, row_options

VOCAB = 500
choose_tokens = jax.jit(sampling.choose_tokens)

OPTIONS = [
    SamplingOptions(temperature=1.0),
    SamplingOptions(temperature=0.3, top_k=1),
    SamplingOptions(temperature=1.7, top_k=40),
    SamplingOptions(temperature=1.0, top_k=10**9),
    SamplingOptions(temperature=0.8, top_p=0.9),
    SamplingOptions(temperature=1.0, top_p=1e-4),
    SamplingOptions(temperature=1.2, top_k=30, top_p=0.7),
    SamplingOptions(temperature=1.5, min_p=0.1),
    SamplingOptions(temperature=0.9, top_k=100, top_p=0.95, min_p=0.05),
    SamplingOptions(temperature=1.0, min_p=1.0),
    SamplingOptions(temperature=1.0, repetition_penalty=1.3),
    SamplingOptions(temperature=2.0, top_k=50, top_p=0.8, min_p=0.02, repetition_penalty=0.7),
]


def random_logits(rows, scale=3.0, vocab=VOCAB):
    return np.random.default_rng(0).normal(scale=scale, size=(rows, vocab)).astype(np.float32)


def of_transformers(options, tokens, logits):
    """Returns filtered logits of one row, in the order of `GenerationMixin._get_logits_processor`."""
    scores, ids = torch.tensor(logits)[None], torch.tensor(tokens)[None]
    processors = [logits_process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)]
    processors.append(logits_process.TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        processors.append(logits_process.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(logits_process.TopPLogitsWarper(options.top_p))
    processors.append(logits_process.MinPLogitsWarper(options.min_p))
    for processor in processors:
        scores = processor(ids, scores)
    return scores[0].double()


def test_filters_equal_those_of_transformers():
    logits, rng = random_logits(len(OPTIONS)), np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, (len(OPTIONS), 60))
    rows = row_options(OPTIONS)

    @jax.jit
    def filtered(logits, rows, tokens):
        seen = sampling.seen_tokens(tokens, jnp.ones(tokens.shape, bool), VOCAB)
        return sampling.filter_logits(sampling.penalize(logits, seen, rows.repetition_penalty), rows)

    ours = np.asarray(filtered(logits, rows, tokens), np.float64)
    kept = []
    for row, options in enumerate(OPTIONS):
        theirs = of_transformers(options, tokens[row], logits[row])
        np.testing.assert_array_equal(np.isfinite(ours[row]), np.isfinite(theirs.numpy()), err_msg=str(options))
        probabilities = scipy.special.softmax(ours[row])
        np.testing.assert_allclose(probabilities, torch.softmax(theirs, -1).numpy(), atol=1e-6, rtol=0)
        kept.append(np.isfinite(ours[row]).sum())
    assert kept[0] == VOCAB and kept[1] == kept[5] == kept[9] == 1 and all(1 < n < VOCAB for n in kept[6:9])


def test_seen_tokens_leave_out_padding():
    tokens, is_text = jnp.array([[1, 2, 2], [3, 0, 0]]), jnp.array([[True, True, True], [True, False, False]])
    seen = sampling.seen_tokens(tokens, is_text, 4)
    np.testing.assert_array_equal(seen, [[False, True, True, False], [False, False, False, True]])


def test_draws_have_the_distribution_of_the_filtered_logits():
    """Chi-square tests of 10,000 draws per set of options."""
    number, vocab = 10_000, 24
    logits = random_logits(1, 1.5, vocab)[0]
    for options in (
        SamplingOptions(temperature=1.0, seed=1),
        SamplingOptions(temperature=0.7, top_k=8, seed=2),
        SamplingOptions(temperature=1.3, top_p=0.8, min_p=0.05, seed=3),
    ):
        one = row_options([options])
        many = type(one)(*(np.repeat(array, number) for array in one))
        batch = np.broadcast_to(logits, (number, vocab))
        drawn = np.asarray(choose_tokens(batch, many, np.zeros((number, vocab), bool), np.arange(number)))
        expected = np.asarray(jax.nn.softmax(sampling.filter_logits(logits[None], one), axis=-1))[0].astype(np.float64)
        counts = np.bincount(drawn, minlength=vocab)
        assert not counts[expected == 0].any()
        likely = expected > 0
        result = scipy.stats.chisquare(counts[likely], expected[likely] / expected[likely].sum() * number)
        assert result.pvalue > 1e-3, options


def test_a_draw_depends_on_its_own_row_alone():
    requests = [SamplingOptions(temperature=1.0, seed=seed, n=2) for seed in (7, 8)] + [SamplingOptions()]
    logits, rows, steps = random_logits(5), row_options(requests), np.array([3, 3, 3, 4, 0])
    seen = np.zeros((5, VOCAB), bool)
    together = np.asarray(choose_tokens(logits, rows, seen, steps))
    for i in range(5):
        alone = type(rows)(*(array[i : i + 1] for array in rows))
        assert choose_tokens(logits[i : i + 1], alone, seen[:1], steps[i : i + 1])[0] == together[i]
    assert together[4] == logits[4].argmax()
    # With equal logits, different seeds, copies and steps give different draws.
    same = np.broadcast_to(logits[:1] * 0, (5, VOCAB))
    for steps in ([3, 3, 3, 3, 0], [4, 4, 4, 4, 0]):
        together = np.append(together, choose_tokens(same, rows, seen, np.array(steps))[:4])
    assert len(set(together[5:].tolist())) == 8


def test_requests_without_a_seed_differ():
    first, second = (row_options([SamplingOptions(temperature=1.0)]) for _ in range(2))
    assert first.seed != second.seed


def test_temperature_zero_takes_the_most_likely_token_after_the_penalty():
    logits = np.array([[1.0, 3.0, 2.9]], np.float32)
    seen = np.array([[False, True, False]])
    for penalty, token in ((1.0, 1), (1.2, 2)):
        rows = row_options([SamplingOptions(repetition_penalty=penalty)])
        assert choose_tokens(logits, rows, seen, np.array([0]))[0] == token


def test_log_probabilities():
    logits = random_logits(3)
    values, tokens = sampling.top_log_probabilities(logits, 4)
    expected = torch.log_softmax(torch.tensor(logits), -1).topk(4)
    np.testing.assert_array_equal(tokens, expected.indices)
    np.testing.assert_allclose(values, expected.values, atol=1e-5)
    np.testing.assert_allclose(sampling.token_log_probabilities(logits, tokens[:, 1]), values[:, 1], atol=1e-6)


@pytest.mark.parametrize(
    "options, why",
    [
        (dict(temperature=-1), "temperature: expected a number from 0 to 100, got -1"),
        (dict(temperature=float("nan")), "temperature: expected a number from 0 to 100, got nan"),
        (dict(temperature="hot"), "temperature: expected a number, got 'hot'"),
        (dict(top_p=0), "top_p: expected a number above 0"),
        (dict(top_p=1.1), "top_p: expected a number from 0 to 1"),
        (dict(min_p=2), "min_p"),
        (dict(repetition_penalty=0), "repetition_penalty: expected a number above 0"),
        (dict(top_k=1.5), "top_k: expected a whole number, got 1.5"),
        (dict(top_k=True), "top_k: expected a whole number, got True"),
        (dict(seed=-1), "seed"),
        (dict(n=0), "n: expected a number from 1 to 128"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(logprobs=21), "logprobs: expected a number from 0 to 20"),
        (dict(stop=("", "a")), "stop: expected texts that are not empty"),
        (dict(stop=7), "stop"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, why):
    with pytest.raises(UserError, match=why):
        SamplingOptions(**options)


def test_one_stop_text_may_be_given_alone():
    assert SamplingOptions(stop="\n").stop == ("\n",) and SamplingOptions(stop=["a", "b"]).stop == ("a", "b")
