"""Integrated gradients of an answer: how much each patch of the page contributed to it.

Axes: T patches of all tiles, D model width, A answer tokens, G rows of the result (one per answer token, or a single
row for the whole answer).

v_t is what ALIGN gives the decoder for patch t of the page, and b_t the same for a white page of the same size. With
f_a(v) = log p(answer token a | page v, question, previous tokens), the share of patch t in token a is

    c_at = (v_t - b_t) · integral over u from 0 to 1 of df_a/dv_t (b + u (v - b))        nats, positive or negative

The share c_at is the part of the answer's rise in log-probability, relative to a blank page, that is due to patch t.
The shares add up to that rise (Sundararajan et al., "Axiomatic Attribution for Deep Networks", arXiv 1703.01365):

    sum_t c_at = f_a(v) - f_a(b)

up to the error of the numerical integration (midpoint rule with `steps` equal intervals), which `Attribution.missing`
reports.

Integrated gradients are often criticized because a straight path leads through inputs that the model has never seen.
The objection is weak here. Every point between b and v is a mixture of the words that the patches of the two pages
name, and mixtures of words are all that the decoder ever receives from ALIGN.

The shares do not explain the vision encoder: through its attention, a patch's words already depend on the rest of the
tile. A patch that repeats what another one says shares the credit with it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alignvlm_jax.inference.generate import Prompt, pad_prompts
from alignvlm_jax.inference.vocabulary import Variables
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, Batch
from alignvlm_jax.progress import progress_bar

_LENGTH_STEP = 16


@dataclasses.dataclass(frozen=True)
class Attribution:
    """Contribution of each patch to an answer.

    Attributes:
      log_probs: log-probability of each answer token, given this page.
      blank_log_probs: the same for a blank page, with the same previous tokens.
      shares: contribution of each patch to each answer token, or (G = 1) to the whole answer, in nats.
    """

    log_probs: Float[np.ndarray, " A"]
    blank_log_probs: Float[np.ndarray, " A"]
    shares: Float[np.ndarray, "G T"]

    @property
    def missing(self) -> float:
        """Part of the rise in log-probability that the shares do not account for: the relative integration error."""
        rise = float(np.sum(self.log_probs - self.blank_log_probs))
        return abs(float(np.sum(self.shares)) - rise) / max(abs(rise), 1e-9)


@ordinary_modes()
def attribute(
    config: AlignVLMConfig,
    variables: Variables,
    prompt: Prompt,
    answer: Int[np.ndarray, " A"],
    visual: Float[np.ndarray, "T D"],
    blank: Float[np.ndarray, "T D"],
    *,
    steps: int = 32,
    per_token: bool = True,
    progress: bool = True,
) -> Attribution:
    """Computes integrated gradients of the answer's log-probability (formula in the module docstring).

    Args:
      config: model config.
      variables: model variables, as returned by `inference.vocabulary`.
      prompt: page and question.
      answer: ids of at least one token.
      visual: output of the connector for each patch of the page.
      blank: the same for a blank page.
      steps: number of points on the path; each costs one forward and one backward pass through the decoder.
      per_token: compute one map per answer token, which takes one backward pass per token and step.
      progress: show a progress bar.

    Returns:
      The shares and the log-probabilities that they add up to.
    """
    # A nine-tile page has thousands of positions, so recompute activations in the backward pass.
    language = dataclasses.replace(config.language, remat="full")
    model = AlignVLM(dataclasses.replace(config, language=language))
    batch = _append_answer(config, prompt, answer)
    # Pad to a multiple of 16 tokens, so that answers of similar length share a compiled program.
    padded = np.zeros(-(-len(answer) // _LENGTH_STEP) * _LENGTH_STEP, np.int32)
    padded[: len(answer)] = answer
    # One row per map: it selects the tokens whose log-probabilities are summed. Padding tokens have weight 0.
    token_weights = np.eye(len(answer), len(padded), dtype=np.float32)
    if not per_token:
        token_weights = token_weights.sum(axis=0, keepdims=True)
    fixed = (model, variables, batch, len(prompt.tokens), padded)
    shares = np.zeros((len(token_weights), len(visual)))
    with progress_bar(desc="attributing the answer", total=steps * len(token_weights), show=progress) as bar:
        for step in range(steps):
            for row, weights in enumerate(token_weights):
                # Midpoint rule: the gradient at the center of each interval stands for the interval.
                shares[row] += _shares(
                    *fixed, weights=weights, visual=visual, blank=blank, fraction=(step + 0.5) / steps
                )
                bar.update()
    log_probs, blank_log_probs = (np.asarray(_log_probs(*fixed, tokens))[: len(answer)] for tokens in (visual, blank))
    return Attribution(log_probs, blank_log_probs, shares / steps)


def _append_answer(config: AlignVLMConfig, prompt: Prompt, answer: Int[np.ndarray, " A"]) -> Batch:
    """Returns the prompt followed by the answer, as a batch of one row without tiles."""
    chat = dataclasses.replace(
        prompt,
        tokens=np.concatenate([prompt.tokens, answer]),
        visual_index=np.concatenate([prompt.visual_index, np.full(len(answer), -1, prompt.visual_index.dtype)]),
        tiles=prompt.tiles[:0],
        tile_valid_hw=prompt.tile_valid_hw[:0],
    )
    batch = pad_prompts([chat], rows=1, tile_size=config.vision.image_size, pad_id=0)
    return {name: array for name, array in batch.items() if not name.startswith("tile")}


@functools.partial(jax.jit, static_argnames="model")
def _log_probs(
    model: AlignVLM,
    variables: Variables,
    batch: Batch,
    first: int,
    answer: Int[Array, " A"],
    visual: Float[Array, "T D"],
) -> Float[Array, " A"]:
    """Returns log p of each answer token. The first one is at position `first`.

    Values for padding tokens are meaningless.
    """

    def score(model: AlignVLM):
        inputs = model.merge(batch, visual[None])
        hidden, _ = model.language(inputs, positions=batch["positions"], segment_ids=batch["segment_ids"])
        # The logits of a token come from the position before it. Padding may reach past the end of the sequence.
        before = jnp.minimum(first - 1 + jnp.arange(answer.shape[0]), hidden.shape[1] - 1)
        return jax.nn.log_softmax(model.language.logits(hidden[0, before]))

    log_p = model.apply(variables, method=score)
    return jnp.take_along_axis(log_p, answer[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames="model")
def _shares(
    model: AlignVLM,
    variables: Variables,
    batch: Batch,
    first: int,
    answer: Int[Array, " A"],
    *,
    weights: Float[Array, " A"],
    visual: Float[Array, "T D"],
    blank: Float[Array, "T D"],
    fraction: float,
) -> Float[Array, " T"]:
    """Returns (v - b) · gradient of the weighted sum of the tokens' log-probabilities, at one point of the path."""
    difference = (visual - blank).astype(jnp.float32)
    point = (blank + fraction * difference).astype(visual.dtype)
    gradient = jax.grad(lambda tokens: _log_probs(model, variables, batch, first, answer, tokens) @ weights)(point)
    return jnp.sum(gradient.astype(jnp.float32) * difference, axis=-1)
