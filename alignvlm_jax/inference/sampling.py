"""Chooses the next token from the logits of a model, with options of its own for every row.

Axes: B rows, V vocabulary, L positions of a text, k most likely tokens.

The order of the steps is that of transformers, and so are the tokens that stay:

    logits -> repetition penalty -> temperature -> top_k -> top_p -> min_p -> draw

All functions are pure and take the options as arrays, so one compiled program serves every mixture of options. A draw
depends on the row's logits, seed, copy and step, and on nothing else: a request has the same answer in any batch.

Example, a row with probabilities .5 .3 .15 .05 at temperature 1:

    top_k=3     keeps .5 .3 .15
    top_p=.8    keeps .5 .3: the most likely tokens, up to the one with which their sum reaches .8
    min_p=.2    keeps .5 .3 .15: those with at least .2 times the highest probability
"""

import dataclasses
import math
import secrets
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from alignvlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Settings for choosing the answer to one request.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: number of most likely tokens to draw from; 0 stands for all.
      top_p: share of the probability that the tokens to draw from must have together.
      min_p: smallest probability of a token to draw from, as a share of the highest.
      repetition_penalty: divides the positive logits of tokens that the text has already, and multiplies negative ones.
      seed: seed of the draws; None stands for a random one.
      stop: texts that end the answer. They are not part of it.
      max_new_tokens: maximum length of the answer.
      n: number of answers.
      logprobs: number of most likely tokens whose log-probabilities are returned at each step; None returns none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 128
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        for name, low, high in _FLOATS:
            _check_number(name, getattr(self, name), low, high)
        if self.repetition_penalty == 0:
            raise UserError("repetition_penalty: expected a number above 0, got 0. 1 means no penalty")
        if self.top_p == 0:
            raise UserError("top_p: expected a number above 0, got 0. For the most likely token, set temperature to 0")
        for name, low, high in _INTEGERS:
            value = getattr(self, name)
            if value is None and name in ("seed", "logprobs"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise UserError(f"{name}: expected a whole number, got {value!r}")
            _check_number(name, value, low, high)
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop: expected texts that are not empty, got {self.stop!r}")


# Name, lowest and highest value.
_FLOATS = (
    ("temperature", 0, 100),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("repetition_penalty", 0, 100),
)
_INTEGERS = (
    ("top_k", 0, 2**31 - 1),
    ("seed", 0, 2**32 - 1),
    ("max_new_tokens", 1, 2**31 - 1),
    ("n", 1, 128),
    ("logprobs", 0, 20),
)


def _check_number(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise UserError(f"{name}: expected a number, got {value!r}")
    if not (math.isfinite(value) and low <= value <= high):
        raise UserError(f"{name}: expected a number from {low} to {high}, got {value}")


class RowOptions(NamedTuple):
    """Sampling options of the rows of a batch, as arrays. `SamplingOptions` describes the first five.

    Attributes:
      temperature: see `SamplingOptions`.
      top_k: see `SamplingOptions`.
      top_p: see `SamplingOptions`.
      min_p: see `SamplingOptions`.
      repetition_penalty: see `SamplingOptions`.
      seed: seed of the request.
      copy: number of the answer among the `n` of a request.
    """

    temperature: Float[np.ndarray, " B"]
    top_k: Int[np.ndarray, " B"]
    top_p: Float[np.ndarray, " B"]
    min_p: Float[np.ndarray, " B"]
    repetition_penalty: Float[np.ndarray, " B"]
    seed: UInt32[np.ndarray, " B"]
    copy: UInt32[np.ndarray, " B"]


def row_options(requests: Sequence[SamplingOptions]) -> RowOptions:
    """Returns the options of the rows of some requests: `n` adjacent rows for each."""
    seeds = [secrets.randbits(32) if request.seed is None else request.seed for request in requests]
    copies = np.array([request.n for request in requests], int)

    def column(name, dtype):
        return np.repeat(np.array([getattr(request, name) for request in requests], dtype), copies)

    return RowOptions(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
        seed=np.repeat(np.array(seeds, np.uint32), copies),
        copy=np.concatenate([np.arange(n) for n in copies] or [[]]).astype(np.uint32),
    )


def seen_tokens(tokens: Int[Array, "B L"], is_text: Bool[Array, "B L"], vocab_size: int) -> Bool[Array, "B V"]:
    """Returns which tokens the texts have, for the repetition penalty.

    Args:
      tokens: the texts.
      is_text: False at padding and at visual tokens.
      vocab_size: size of the vocabulary V.
    """
    seen = jnp.zeros((len(tokens), vocab_size), bool)
    rows = jnp.arange(len(tokens))[:, None]
    # An index beyond the vocabulary is dropped.
    return seen.at[rows, jnp.where(is_text, tokens, vocab_size)].set(True, mode="drop")


def choose_tokens(
    logits: Float[Array, "B V"], options: RowOptions, seen: Bool[Array, "B V"], step: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Returns the next token of each row.

    Args:
      logits: logits of the model.
      options: options of the rows.
      seen: tokens that the row's text has already.
      step: number of tokens that the row's answer has already.
    """
    penalized = penalize(logits, seen, options.repetition_penalty)
    filtered = filter_logits(penalized, options)

    def noise(seed, copy, step):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), copy), step)
        return jax.random.gumbel(key, logits.shape[1:], jnp.float32)

    # The token with the highest sum of logit and Gumbel noise is a draw from the softmax of the logits.
    drawn = jnp.argmax(filtered + jax.vmap(noise)(options.seed, options.copy, step), axis=-1)
    return jnp.where(options.temperature == 0, jnp.argmax(penalized, axis=-1), drawn)


def penalize(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Returns the logits in float32, lower for the tokens that were seen."""
    logits, penalty = logits.astype(jnp.float32), penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(logits: Float[Array, "B V"], options: RowOptions) -> Float[Array, "B V"]:
    """Returns the logits at the row's temperature, with minus infinity for the tokens that are not drawn from.

    Rows of temperature 0 are treated as at temperature 1. Tokens as likely as the last one that stays also stay.
    """
    temperature = jnp.where(options.temperature == 0, 1.0, options.temperature)[:, None]
    logits = logits.astype(jnp.float32) / temperature
    ordered = -jnp.sort(-logits, axis=-1)  # from the most to the least likely
    vocab_size = logits.shape[-1]

    # Each filter keeps a beginning of the order, so the lowest logit that stays describes it.
    last = jnp.where(options.top_k == 0, vocab_size, jnp.minimum(options.top_k, vocab_size)) - 1
    lowest = jnp.take_along_axis(ordered, last[:, None], axis=-1)

    # The probabilities are those among the tokens that top_k keeps.
    probabilities = jax.nn.softmax(jnp.where(ordered >= lowest, ordered, -jnp.inf), axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = options.top_p[:, None]
    # Rounding may bring the sum to 1 too early, so a top_p of 1 is a case of its own. The first token always stays.
    is_kept = (mass_before < top_p) | (top_p >= 1)
    lowest = jnp.maximum(lowest, jnp.min(jnp.where(is_kept, ordered, jnp.inf), axis=-1, keepdims=True))

    lowest = jnp.maximum(lowest, ordered[:, :1] + jnp.log(options.min_p[:, None]))
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def token_log_probabilities(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Float[Array, " B"]:
    """Returns the log-probability of one token of each row under the model, before all options."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.take_along_axis(log_p, tokens[:, None], axis=-1)[:, 0]


def top_log_probabilities(logits: Float[Array, "B V"], k: int) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """Returns the k highest log-probabilities of each row under the model, before all options, and their tokens."""
    return jax.lax.top_k(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), k)
