"""Greedy decoding in batches of static shapes.

Axes: B prompts, R = K B rows, K views, L positions of the padded prompt, A positions of the answer, M tiles per row, S
tile side, V vocabulary.

Prompts are padded on the right and read at once (prefill); the answers then grow in one compiled loop that stops when
every row has ended. All rows write the same slots of the cache, and a slot that is padding in its row is never seen:

    slots      | prompt of 5, padded to L = 8 | answer
    row 0      | p p p p p . . .              | a a <end>
    row 1      | p p p p p p p .              | a a a <end>
    positions  | 0 1 2 3 4 . . .              | 5 6 7         (row 0: they go on where the prompt ended)

so an answer does not depend on what else is in the batch. B, L and M are rounded up to few values, to compile rarely.

A prompt may bring its images in K views (`inference/views.py`): then K rows beside each other are one prompt, and the
next token of all of them is the one that is likeliest to them together.
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from alignvlm_jax.data.resampling import Resampling, at_positions
from alignvlm_jax.inference.vocabulary import Variables, cache_vocabulary
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, Batch, Params
from alignvlm_jax.models.feature_noise import FeatureNoise
from alignvlm_jax.models.language import empty_cache
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import num_batch_shards

_LENGTH_STEP = 64


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One conversation up to where the model speaks.

    Attributes:
      tokens: ids, with placeholders where visual tokens go.
      visual_index: which of this prompt's visual tokens goes at each position, -1 = text.
      tiles: pixels of all tiles of all images; there may be none.
      tile_valid_hw: the part of each tile that is picture.
      resampling: under the tiling rule anyres_max_9, what each visual token is made of.
      moved: the same tiles in all views but the first, which is `tiles`; None if there is no other.
    """

    tokens: Int[np.ndarray, " L"]
    visual_index: Int[np.ndarray, " L"]
    tiles: UInt8[np.ndarray, "M S S 3"]
    tile_valid_hw: Int[np.ndarray, "M 2"]
    resampling: Resampling | None = None
    moved: UInt8[np.ndarray, "K-1 M S S 3"] | None = None

    @property
    def num_views(self) -> int:
        """K."""
        return 1 if self.moved is None else 1 + len(self.moved)

    def views(self) -> "list[Prompt]":
        """The same conversation with each view of its images, as prompts of one view."""
        others = () if self.moved is None else self.moved
        return [dataclasses.replace(self, tiles=tiles, moved=None) for tiles in (self.tiles, *others)]


class Generator:
    """A model with its parameters, ready to answer batches of prompts."""

    def __init__(
        self,
        config: AlignVLMConfig,
        params: Params,
        *,
        end_ids: Sequence[int],
        pad_id: int,
        batch_size: int = 32,
        mesh: Mesh | None = None,
    ):
        """Args:
        config: of the model.
        params: of the model, boxed in logical axis names or not.
        end_ids: tokens that end an answer.
        pad_id: fills prompts up; any valid id will do.
        batch_size: most prompts decoded at once; prompts of K views count K times.
        mesh: of the devices that `params` lie on, over which the prompts are spread; None is the one device that they
          are on. With several processes each must be asked the same, and hears all answers.
        """
        self.config = config
        self.mesh = mesh
        # The weights are frozen from here on: what ALIGN needs to know of W2 is computed once.
        with self._on_mesh():
            self.variables = cache_vocabulary(config, params)
        self.end_ids = tuple(end_ids)
        self.pad_id = pad_id
        self.batch_size = batch_size

    def with_feature_noise(self, sigma: float, seed: int) -> "Generator":
        """One of the same weights that adds noise to what the connector reads; see `models/feature_noise.py`."""
        noisy = copy.copy(self)
        noisy.variables = {**self.variables, "perturbation": {"features": FeatureNoise.of(sigma, seed)}}
        return noisy

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, *, on_batch: Callable[[int], Any] | None = None
    ) -> list[Int[np.ndarray, " A"]]:
        """The answers' ids, in the order of the prompts, without the end token.

        Args:
          prompts: any number of them.
          max_new_tokens: A, where an answer that does not end is cut off.
          on_batch: called after each batch with the number of prompts it answered, for progress bars.
        """
        answers: list = [None] * len(prompts)
        for chosen in self._batches(prompts):
            views = prompts[chosen[0]].num_views
            batch = pad_prompts(
                [view for i in chosen for view in prompts[i].views()],
                rows=views * self._num_rows(len(chosen), views),
                tile_size=self.config.vision.image_size,
                pad_id=self.pad_id,
            )
            decoded = self._decode(batch, max_new_tokens, views)
            for i, row in zip(chosen, decoded[: len(chosen)], strict=True):
                ends = np.flatnonzero(np.isin(row, self.end_ids))
                answers[i] = row[: ends[0]] if len(ends) else row
            if on_batch is not None:
                on_batch(len(chosen))
        return answers

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Which prompts share a batch: those of like size, so that little of it is padding, and of as many views."""
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].tiles), len(prompts[i].tokens)))
        for views in sorted({prompt.num_views for prompt in prompts}):
            alike, size = [i for i in order if prompts[i].num_views == views], self._most_prompts(views)
            yield from (alike[start : start + size] for start in range(0, len(alike), size))

    def _most_prompts(self, views: int) -> int:
        return max(1, self.batch_size // views)

    def _num_rows(self, prompts: int, views: int) -> int:
        """B: prompts of a batch, padding included; each device has all views of its prompts."""
        rows = min(self._most_prompts(views), _power_of_two(prompts))
        shards = 1 if self.mesh is None else num_batch_shards(self.mesh)
        return -(-rows // shards) * shards

    def _decode(self, batch: Batch, max_new_tokens: int, views: int) -> Int[np.ndarray, "B A"]:
        options = dict(max_new_tokens=max_new_tokens, end_ids=self.end_ids, pad_id=self.pad_id, views=views)
        with self._on_mesh():
            if self.mesh is None:
                return np.asarray(greedy_decode(AlignVLM(self.config), self.variables, batch, **options))
            batch = sharding.shard_rows(batch, self.mesh)
            answers = greedy_decode(AlignVLM(self.config), self.variables, batch, **options)
            return np.asarray(jax.device_put(answers, NamedSharding(self.mesh, PartitionSpec())))

    @contextlib.contextmanager
    def _on_mesh(self) -> Iterator[None]:
        """Where the model's names of axes mean axes of the mesh, if there is one."""
        if self.mesh is None:
            yield
        else:
            with jax.set_mesh(self.mesh), sharding.logical_rules():
                yield


def pad_prompts(prompts: Sequence[Prompt], *, rows: int, tile_size: int, pad_id: int) -> Batch:
    """Prompts as the rows of a batch; rows beyond them are all padding.

    before: tokens of lengths 5 and 7, rows=4
    after:  tokens [4, 64], segment_ids 1 at the first 5 and 7 positions of rows 0 and 1, else 0
    """
    longest = max(len(prompt.tokens) for prompt in prompts)
    length = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
    # At least one tile, so that gathering visual tokens has something to gather from.
    num_tiles = _power_of_two(max(1, *(len(prompt.tiles) for prompt in prompts)))
    batch = {
        "tokens": np.full((rows, length), pad_id, np.int32),
        "segment_ids": np.zeros((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "visual_index": np.full((rows, length), -1, np.int32),
        "tiles": np.zeros((rows, num_tiles, tile_size, tile_size, 3), np.uint8),
        "tile_valid_hw": np.zeros((rows, num_tiles, 2), np.int32),
    }
    for row, prompt in enumerate(prompts):
        batch["tokens"][row, : len(prompt.tokens)] = prompt.tokens
        batch["segment_ids"][row, : len(prompt.tokens)] = 1
        batch["visual_index"][row, : len(prompt.tokens)] = prompt.visual_index
        batch["tiles"][row, : len(prompt.tiles)] = prompt.tiles
        batch["tile_valid_hw"][row, : len(prompt.tiles)] = prompt.tile_valid_hw
    if prompts[0].resampling is not None:
        batch["visual_sources"] = np.zeros((rows, length, 4), np.int32)
        batch["visual_weights"] = np.zeros((rows, length, 4), np.float32)
        for row, prompt in enumerate(prompts):
            sources, weights = at_positions(prompt.visual_index, prompt.resampling)
            batch["visual_sources"][row, : len(sources)] = sources
            batch["visual_weights"][row, : len(weights)] = weights
    return batch


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "end_ids", "pad_id", "views"))
def greedy_decode(
    model: AlignVLM,
    variables: Variables,
    batch: Batch,
    *,
    max_new_tokens: int,
    end_ids: tuple[int, ...],
    pad_id: int,
    views: int = 1,
) -> Int[Array, "B A"]:
    """Answers of A = `max_new_tokens` ids: up to and including the end token, then `pad_id`.

    Args:
      model, variables: the model.
      batch: the prompts, R rows.
      max_new_tokens: A.
      end_ids: tokens that end an answer.
      pad_id: what comes after.
      views: K; each K rows are views of one prompt.
    """
    rows, length = batch["tokens"].shape
    cache = empty_cache(model.config.language, rows, length + max_new_tokens)
    logits, cache = model.apply(variables, batch, cache, method="prefill")
    prompt_lengths = jnp.sum(batch["segment_ids"] > 0, axis=1)

    def unfinished(state):
        step, _, ended, _, _ = state
        return (step < max_new_tokens) & ~jnp.all(ended)

    def decode(state):
        step, token, ended, answers, cache = state
        answers = answers.at[:, step].set(jnp.where(ended, pad_id, token))
        ended |= jnp.isin(token, jnp.array(end_ids))
        logits, cache = model.apply(variables, token, prompt_lengths + step, cache, method="decode_step")
        return step + 1, _likeliest(logits, views), ended, answers, cache

    answers = jnp.full((rows, max_new_tokens), pad_id, jnp.int32)
    start = (0, _likeliest(logits, views), prompt_lengths == 0, answers, cache)
    return jax.lax.while_loop(unfinished, decode, start)[3][::views]


def _likeliest(logits: Float[Array, "R V"], views: int) -> Int[Array, " R"]:
    """The next token of each row: of the views of one prompt the same, by their mean log-probability."""
    if views == 1:
        return jnp.argmax(logits, axis=-1)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.repeat(jnp.argmax(log_p.reshape(-1, views, log_p.shape[-1]).mean(axis=1), axis=-1), views)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
