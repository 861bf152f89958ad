"""Which patches an answer leaned on: integrated gradients from a blank page to this one.

Axes: T visual tokens' features (all tiles' patches), D decoder width, A answer tokens, G rows of a map: the answer's
tokens, or one for all of it. v_t: what ALIGN gives the decoder for patch t of this page; b_t: for patch t of a white
page of the same size; f_a(v) = log p(answer token a | page v, question, the tokens before).

    c_at = (v_t - b_t) · integral over u from 0 to 1 of df_a/dv_t (b + u (v - b))        nats, + or -

So c_at says how much of the answer's rise in log-probability, over what it would be on a blank page, is patch t's. The
shares add up (Sundararajan et al., "Axiomatic attribution for deep networks", arXiv 1703.01365):

    sum_t c_at = f_a(v) - f_a(b)

up to the error of the sum that stands for the integral (midpoints of `steps` equal intervals): `Attribution.missing`.
All points between b and v are mixtures of the words that the patches of both pages name, which ALIGN's outputs always
are: so the usual objection, that a straight path leads through inputs the decoder has never met, is weak here.

What it is not: an explanation of the vision encoder. A patch's words already depend, by the encoder's attention, on the
rest of its tile. And a patch that merely repeats what another one says shares the credit with it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from alignvlm_jax.inference.generate import Prompt, pad_prompts
from alignvlm_jax.inference.vocabulary import Variables
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, Batch

_LENGTH_STEP = 16


@dataclasses.dataclass(frozen=True)
class Attribution:
    """What each patch gave to an answer.

    log_probs: of each answer token, on this page.
    blank_log_probs: of the same tokens after the same ones, on a blank page.
    shares: of each patch in each answer token, or (G = 1) in the whole answer; nats.
    """

    log_probs: Float[np.ndarray, " A"]
    blank_log_probs: Float[np.ndarray, " A"]
    shares: Float[np.ndarray, "G T"]

    @property
    def missing(self) -> float:
        """What the shares do not account for, as part of what they should: the error of the integral."""
        rise = float(np.sum(self.log_probs - self.blank_log_probs))
        return abs(float(np.sum(self.shares)) - rise) / max(abs(rise), 1e-9)


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
    """Integrated gradients of the answer's log-probability; the module's docstring has the formula.

    Args:
      config: of the model.
      variables: of the model, as `inference.vocabulary` makes them.
      prompt: page and question.
      answer: ids of at least one token.
      visual: what the connector gives for each patch of the page.
      blank: the same of a blank page.
      steps: gradients taken, each one pass through the decoder forward and one back.
      per_token: a map for each answer token: as many passes back as there are tokens.
      progress: show a bar.
    """
    # Activations are computed again on the way back: a nine-tile page is thousands of positions.
    language = dataclasses.replace(config.language, remat="full")
    model = AlignVLM(dataclasses.replace(config, language=language))
    batch = _with_answer(config, prompt, answer)
    # Padded, so that answers of like length share a compiled program.
    padded = np.zeros(-(-len(answer) // _LENGTH_STEP) * _LENGTH_STEP, np.int32)
    padded[: len(answer)] = answer
    weights = np.eye(len(answer), len(padded), dtype=np.float32)
    if not per_token:
        weights = weights.sum(axis=0, keepdims=True)
    fixed = (model, variables, batch, len(prompt.tokens), padded)
    shares = np.zeros((len(weights), len(visual)))
    with tqdm(total=steps * len(weights), desc="attributing the answer", disable=not progress) as bar:
        for step in range(steps):
            for row, of_tokens in enumerate(weights):
                shares[row] += _shares(*fixed, of_tokens, visual, blank, (step + 0.5) / steps)
                bar.update()
    log_probs, blank_log_probs = (np.asarray(_log_probs(*fixed, seen))[: len(answer)] for seen in (visual, blank))
    return Attribution(log_probs, blank_log_probs, shares / steps)


def _with_answer(config: AlignVLMConfig, prompt: Prompt, answer: Int[np.ndarray, " A"]) -> Batch:
    """The prompt with the answer behind it, as a batch of one row without tiles."""
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
    """log p of each answer token, the first of which is at position `first`; nonsense for those that pad the answer."""

    def score(model: AlignVLM):
        inputs = model.merge(batch, visual[None])
        hidden, _ = model.language(inputs, positions=batch["positions"], segment_ids=batch["segment_ids"])
        before = jnp.minimum(first - 1 + jnp.arange(answer.shape[0]), hidden.shape[1] - 1)
        return jax.nn.log_softmax(model.language.logits(hidden[0, before]))

    log_p = model.apply(variables, method=score)
    return jnp.take_along_axis(log_p, answer[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames="model")
def _shares(model, variables, batch, first, answer, weights, visual, blank, share) -> Float[Array, " T"]:
    """(v - b) · gradient of the weighted sum of the tokens' log-probabilities, at one point of the path."""
    difference = (visual - blank).astype(jnp.float32)
    at = (blank + share * difference).astype(visual.dtype)
    gradient = jax.grad(lambda seen: _log_probs(model, variables, batch, first, answer, seen) @ weights)(at)
    return jnp.sum(gradient.astype(jnp.float32) * difference, axis=-1)
