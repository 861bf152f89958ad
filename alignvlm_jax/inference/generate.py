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
from jaxtyping import Array, Float, Int

from alignvlm_jax.inference.prompts import Prompt, first_answer, pad_prompts, power_of_two
from alignvlm_jax.inference.vocabulary import Variables, cache_vocabulary
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, Batch, Params
from alignvlm_jax.models.feature_noise import FeatureNoise
from alignvlm_jax.models.language import empty_cache
from alignvlm_jax.models.rematerialization import FULL, NONE
from alignvlm_jax.models.unstacking import unstack_layers, with_layers
from alignvlm_jax.parallel import sharding
from alignvlm_jax.parallel.mesh import num_batch_shards


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
        self._model = AlignVLM(_in_loops(config))
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
            # Rows beyond the prompts are padding.
            for i, row in zip(indices, decoded[: len(indices)], strict=True):
                answers[i] = first_answer(row, self.end_ids)
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
        rows = min(self._max_prompts(views), power_of_two(prompts))
        # All views of a prompt are on one device, so B itself must be divisible by the number of shards.
        shards = 1 if self.mesh is None else num_batch_shards(self.mesh)
        return -(-rows // shards) * shards  # rounded up

    def _decode(self, batch: Batch, max_new_tokens: int, views: int) -> Int[np.ndarray, "B A"]:
        options = dict(max_new_tokens=max_new_tokens, end_ids=self.end_ids, pad_id=self.pad_id, views=views)
        with self._on_mesh():
            if self.mesh is None:
                # Views cost no memory, so they need not be kept.
                layers = unstack_layers(self.variables)
                return np.asarray(greedy_decode(self._model, self.variables, batch, layers, **options))
            batch = sharding.shard_rows(batch, self.mesh)
            answers = greedy_decode(self._model, self.variables, batch, **options)
            # Replicated, so that every process gets all answers.
            return np.asarray(jax.device_put(answers, NamedSharding(self.mesh, PartitionSpec())))

    @ordinary_modes()
    def compile_program(self, batch: Batch, max_new_tokens: int, views: int) -> tuple[jax.stages.Compiled, list[Array]]:
        """Compiles a program that answers a batch, without a mesh.

        Args:
          batch: a batch from `pad_prompts`; only its shapes matter.
          max_new_tokens: maximum length A of an answer.
          views: number of views K.

        Returns:
          The program, which takes a list of arrays and a batch and returns answers [B, A]; and the list: the weights.
        """
        options = dict(max_new_tokens=max_new_tokens, end_ids=self.end_ids, pad_id=self.pad_id, views=views)
        arrays, structure = jax.tree.flatten(self.variables)

        # Stacked layers, unlike in `_decode`: for one prompt of a small model, the time to compile matters most.
        @jax.jit
        def answer(arrays, batch):
            return greedy_decode(self._model, jax.tree.unflatten(structure, arrays), batch, **options)

        return answer.lower(arrays, batch).compile(), arrays

    @contextlib.contextmanager
    def _on_mesh(self) -> Iterator[None]:
        """Maps the model's logical axes to the axes of the mesh, if there is one."""
        if self.mesh is None:
            yield
        else:
            with jax.set_mesh(self.mesh), sharding.logical_rules():
                yield


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


def _in_loops(config: AlignVLMConfig) -> AlignVLMConfig:
    """Returns the config with a loop over the layers, also in a small model on a CPU (`hardware.unrolls_layers`).

    Unrolled layers are faster only in training. A loop compiles in less time, and its program is smaller. Nothing is
    recomputed without gradients.
    """

    def in_loop(part):
        return dataclasses.replace(part, remat=FULL) if part.remat == NONE else part

    return dataclasses.replace(config, vision=in_loop(config.vision), language=in_loop(config.language))


def _next_tokens(logits: Float[Array, "R V"], views: int) -> Int[Array, " R"]:
    """Returns the most likely token of each row, by the mean log-probability over the views of its prompt."""
    if views == 1:
        return jnp.argmax(logits, axis=-1)
    # [R, V] -> [B, K, V] -> mean over views -> [B], repeated for the K rows of each prompt.
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.repeat(jnp.argmax(log_p.reshape(-1, views, log_p.shape[-1]).mean(axis=1), axis=-1), views)
