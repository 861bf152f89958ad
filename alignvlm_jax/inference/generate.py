"""Greedy decoding in batches of static shapes.

Axes: B prompts, R = K B rows, K views, L positions of the padded prompt, A positions of the answer, M tiles per row, S
tile side, V vocabulary.

Prompts are padded on the right and processed at once (prefill). One compiled loop then decodes all answers, and stops
when every row has ended. All rows write to the same slots of the cache, and padding slots of a row are masked:

    slots      | prompt of 5, padded to L = 8 | answer
    row 0      | p p p p p . . .              | a a <end>
    row 1      | p p p p p p p .              | a a a <end>
    positions  | 0 1 2 3 4 . . .              | 5 6 7         (row 0: they continue from the end of the prompt)

An answer therefore does not depend on the other prompts in the batch. B, L and M are rounded up, so that only a few
shapes are compiled.

The images of a prompt may come in K views (`inference/views.py`). K adjacent rows then form one prompt, and the next
token of all of them is the one with the highest mean log-probability.
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
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, Batch, Params
from alignvlm_jax.models.feature_noise import FeatureNoise
from alignvlm_jax.models.language import empty_cache
from alignvlm_jax.models.unstacking import unstack_layers, with_layers
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import num_batch_shards

_LENGTH_STEP = 64


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation up to the model's next turn.

    Attributes:
      tokens: token ids, with placeholders at the positions of visual tokens.
      visual_index: index of the visual token at each position; -1 for text.
      tiles: pixels of the tiles of all images, in the first view. There may be none.
      tile_valid_hw: height and width of the image's part of each tile.
      resampling: sources and weights of each visual token, for the tiling rule anyres_max_9.
      other_views: pixels of the tiles in all views but the first; None for a single view.
      page_scale: smallest scale at which the tiles show an image (`data/page_scale.py`); 1 without images.
    """

    tokens: Int[np.ndarray, " L"]
    visual_index: Int[np.ndarray, " L"]
    tiles: UInt8[np.ndarray, "M S S 3"]
    tile_valid_hw: Int[np.ndarray, "M 2"]
    resampling: Resampling | None = None
    other_views: UInt8[np.ndarray, "K-1 M S S 3"] | None = None
    page_scale: float = 1.0

    @property
    def num_views(self) -> int:
        """Number of views K."""
        return 1 if self.other_views is None else 1 + len(self.other_views)

    def views(self) -> "list[Prompt]":
        """Returns one prompt per view, each with a single view of the images."""
        others = () if self.other_views is None else self.other_views
        return [dataclasses.replace(self, tiles=tiles, other_views=None) for tiles in (self.tiles, *others)]


class Generator:
    """Greedy decoder of batches of prompts, with a model and its parameters."""

    @ordinary_modes()
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
        """Prepares a model for decoding.

        Args:
          config: configuration of the model.
          params: parameters of the model, with or without boxes of logical axis names.
          end_ids: tokens that end an answer.
          pad_id: token that pads prompts; any valid id works.
          batch_size: maximum number of prompts decoded at once. A prompt with K views counts K times.
          mesh: mesh that `params` are placed on, and over which prompts are distributed. None stands for the single
            device of `params`. With several processes, each has to pass the same prompts, and gets all answers.
        """
        self.config = config
        self.mesh = mesh
        # The weights do not change from here on, so ALIGN's statistics of W2 are computed only once.
        with self._on_mesh():
            self.variables = cache_vocabulary(config, params)
        self.end_ids = tuple(end_ids)
        self.pad_id = pad_id
        self.batch_size = batch_size

    @ordinary_modes()
    def with_feature_noise(self, sigma: float, seed: int) -> "Generator":
        """Returns a generator with the same weights and noise on the connector's input (`models/feature_noise.py`)."""
        noisy = copy.copy(self)  # A shallow copy, which shares the weights.
        noisy.variables = {**self.variables, "perturbation": {"features": FeatureNoise.create(sigma, seed)}}
        return noisy

    @ordinary_modes()
    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, *, on_batch: Callable[[int], Any] | None = None
    ) -> list[Int[np.ndarray, " A"]]:
        """Returns the token ids of the answers, in the order of the prompts, without the end token.

        Args:
          prompts: any number of prompts.
          max_new_tokens: maximum length A of an answer.
          on_batch: function called after each batch with the number of prompts it answered, for progress bars.
        """
        answers: list = [None] * len(prompts)
        for indices in self._batches(prompts):
            # A prompt with K views takes K adjacent rows.
            views = prompts[indices[0]].num_views
            batch = pad_prompts(
                [view for i in indices for view in prompts[i].views()],
                rows=views * self._num_rows(len(indices), views),
                tile_size=self.config.vision.image_size,
                pad_id=self.pad_id,
            )
            decoded = self._decode(batch, max_new_tokens, views)
            # Rows beyond the prompts are padding. An answer ends before its first end token.
            for i, row in zip(indices, decoded[: len(indices)], strict=True):
                ends = np.flatnonzero(np.isin(row, self.end_ids))
                answers[i] = row[: ends[0]] if len(ends) else row
            if on_batch is not None:
                on_batch(len(indices))
        return answers

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Yields the indices of the prompts of each batch."""
        # Prompts of similar size share a batch, which keeps padding small. All prompts of a batch have the same K.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].tiles), len(prompts[i].tokens)))
        for views in sorted({prompt.num_views for prompt in prompts}):
            indices, size = [i for i in order if prompts[i].num_views == views], self._max_prompts(views)
            yield from (indices[start : start + size] for start in range(0, len(indices), size))

    def _max_prompts(self, views: int) -> int:
        return max(1, self.batch_size // views)

    def _num_rows(self, prompts: int, views: int) -> int:
        """Returns B, the number of prompts of a batch including padding."""
        rows = min(self._max_prompts(views), _power_of_two(prompts))
        # All views of a prompt are on one device, so B itself must be divisible by the number of shards.
        shards = 1 if self.mesh is None else num_batch_shards(self.mesh)
        return -(-rows // shards) * shards  # rounded up

    def _decode(self, batch: Batch, max_new_tokens: int, views: int) -> Int[np.ndarray, "B A"]:
        options = dict(max_new_tokens=max_new_tokens, end_ids=self.end_ids, pad_id=self.pad_id, views=views)
        with self._on_mesh():
            if self.mesh is None:
                # Views cost no memory, so they need not be kept.
                layers = unstack_layers(self.variables)
                return np.asarray(greedy_decode(AlignVLM(self.config), self.variables, batch, layers, **options))
            batch = sharding.shard_rows(batch, self.mesh)
            answers = greedy_decode(AlignVLM(self.config), self.variables, batch, **options)
            # Replicated, so that every process gets all answers.
            return np.asarray(jax.device_put(answers, NamedSharding(self.mesh, PartitionSpec())))

    @contextlib.contextmanager
    def _on_mesh(self) -> Iterator[None]:
        """Maps the model's logical axes to the axes of the mesh, if there is one."""
        if self.mesh is None:
            yield
        else:
            with jax.set_mesh(self.mesh), sharding.logical_rules():
                yield


def pad_prompts(prompts: Sequence[Prompt], *, rows: int, tile_size: int, pad_id: int) -> Batch:
    """Returns a batch with one prompt per row. Rows beyond the prompts are padding.

    before: tokens of lengths 5 and 7, rows=4
    after:  tokens [4, 64], segment_ids 1 at the first 5 and 7 positions of rows 0 and 1, else 0
    """
    longest = max(len(prompt.tokens) for prompt in prompts)
    length = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
    # At least one tile, because gathering visual tokens from an empty array fails.
    num_tiles = _power_of_two(max(1, *(len(prompt.tiles) for prompt in prompts)))
    batch = {
        "tokens": np.full((rows, length), pad_id, np.int32),
        "segment_ids": np.zeros((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "visual_index": np.full((rows, length), -1, np.int32),
        "tiles": np.zeros((rows, num_tiles, tile_size, tile_size, 3), np.uint8),
        "tile_valid_hw": np.zeros((rows, num_tiles, 2), np.int32),
    }
    # Copy each prompt to the start of its row.
    for row, prompt in enumerate(prompts):
        batch["tokens"][row, : len(prompt.tokens)] = prompt.tokens
        batch["segment_ids"][row, : len(prompt.tokens)] = 1
        batch["visual_index"][row, : len(prompt.tokens)] = prompt.visual_index
        batch["tiles"][row, : len(prompt.tiles)] = prompt.tiles
        batch["tile_valid_hw"][row, : len(prompt.tiles)] = prompt.tile_valid_hw
    # With joined tiles (anyres_max_9), each visual token is a weighted sum of up to four tokens of the tiles.
    if prompts[0].resampling is not None:
        batch["visual_sources"] = np.zeros((rows, length, 4), np.int32)
        batch["visual_weights"] = np.zeros((rows, length, 4), np.float32)
        for row, prompt in enumerate(prompts):
            sources, weights = at_positions(prompt.visual_index, prompt.resampling)
            batch["visual_sources"][row, : len(sources)] = sources
            batch["visual_weights"][row, : len(weights)] = weights
    return batch


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "end_ids", "pad_id", "views"))
@ordinary_modes()
def greedy_decode(
    model: AlignVLM,
    variables: Variables,
    batch: Batch,
    layers: tuple[Params, ...] | None = None,
    *,
    max_new_tokens: int,
    end_ids: tuple[int, ...],
    pad_id: int,
    views: int = 1,
) -> Int[Array, "B A"]:
    """Decodes answers of A = `max_new_tokens` ids: up to and including the end token, then `pad_id`.

    Args:
      model: the model.
      variables: variables of the model.
      batch: batch of prompts with R rows.
      layers: the decoder's weights from `unstack_layers`, with which a CPU decodes faster; None without them.
      max_new_tokens: length A of the answers.
      end_ids: tokens that end an answer.
      pad_id: token that fills an answer after its end.
      views: number of views K; every K adjacent rows are the views of one prompt.
    """
    # Prefill: the cache gets the whole prompt, and `logits` are those of each row's last position.
    rows, length = batch["tokens"].shape
    cache = empty_cache(model.config.language, rows, length + max_new_tokens)
    logits, cache = model.apply(variables, batch, cache, method="prefill")
    prompt_lengths = jnp.sum(batch["segment_ids"] > 0, axis=1)
    if layers is not None:
        variables, cache = with_layers(variables, layers), cache.unstack()

    def unfinished(state):
        step, _, ended, _, _ = state
        return (step < max_new_tokens) & ~jnp.all(ended)

    def decode(state):
        step, token, ended, answers, cache = state
        # The end token itself is written; rows that have already ended get padding.
        answers = answers.at[:, step].set(jnp.where(ended, pad_id, token))
        ended |= jnp.isin(token, jnp.array(end_ids))
        # Positions continue from each row's own prompt, while the slot of the cache is the same for all rows.
        logits, cache = model.apply(variables, token, prompt_lengths + step, cache, method="decode_step")
        return step + 1, _next_tokens(logits, views), ended, answers, cache

    answers = jnp.full((rows, max_new_tokens), pad_id, jnp.int32)
    # Rows without a prompt have ended from the start, so that they do not keep the loop running.
    start = (0, _next_tokens(logits, views), prompt_lengths == 0, answers, cache)
    # All views of a prompt have the same answer, so every K-th row is enough.
    return jax.lax.while_loop(unfinished, decode, start)[3][::views]


def _next_tokens(logits: Float[Array, "R V"], views: int) -> Int[Array, " R"]:
    """Returns the most likely token of each row, by the mean log-probability over the views of its prompt."""
    if views == 1:
        return jnp.argmax(logits, axis=-1)
    # [R, V] -> [B, K, V] -> mean over views -> [B], repeated for the K rows of each prompt.
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.repeat(jnp.argmax(log_p.reshape(-1, views, log_p.shape[-1]).mean(axis=1), axis=-1), views)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
