"""Greedy decoding in batches of static shapes.

Axes: B prompts, R = K B rows, K views, L positions of the padded prompt, A positions of the answer, M tiles per row, S
tile side, V vocabulary, P pages, Q branches of a page.

A prompt that shares its images with no other is answered alone, in one program (`greedy_decode`). Prompts are padded on
the right and processed at once (prefill). One compiled loop then decodes all answers, and stops when every row has
ended. All rows write to the same slots of the cache, and padding slots of a row are masked:

    slots      | prompt of 5, padded to L = 8 | answer
    row 0      | p p p p p . . .              | a a <end>
    row 1      | p p p p p p p .              | a a a <end>
    positions  | 0 1 2 3 4 . . .              | 5 6 7         (row 0: they continue from the end of the prompt)

An answer therefore does not depend on the other prompts in the batch. B, L and M are rounded up, so that only a few
shapes are compiled.

Prompts about the same images share a page (`inference/pages.py`), in two programs. `read_pages` encodes the images of P
pages and reads what the prompts of each have in common. `decode_branches` reads the rest of Q prompts per page, and
decodes their answers. The keys and values of a page stay where they are for all of its rows:

    cache.page        | page of 6           |     row 0 = page 0, branch 0
    page 0            | p p p p p p . .     |     row 1 = page 0, branch 1
    cache             | branch      | answer      |
    row 0             | b b b .     | a a <end>   |     positions 6 7 8, then 9 10 11
    row 1             | b b . .     | a a a <end> |     positions 6 7, then 8 9 10 11

The images of a prompt may come in K views (`inference/views.py`). K adjacent rows then form one prompt, and the next
token of all of them is the one with the highest mean log-probability.
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from alignvlm_jax.inference.pages import Group, PageBatch, group_prompts, pad_branches, pad_pages, plan_batches
from alignvlm_jax.inference.prompts import Prompt, first_answer, pad_prompts
from alignvlm_jax.inference.vocabulary import Variables, cache_vocabulary
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, Batch, Params
from alignvlm_jax.models.feature_noise import FeatureNoise
from alignvlm_jax.models.hardware import MAX_UNROLLED_LAYERS
from alignvlm_jax.models.language import KVCache, empty_cache
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
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        *,
        on_batch: Callable[[int], Any] | None = None,
        share_pages: bool = True,
    ) -> list[Int[np.ndarray, " A"]]:
        """Returns the token ids of the answers, in the order of the prompts, without the end token.

        Args:
          prompts: any number of prompts.
          max_new_tokens: maximum length A of an answer.
          on_batch: function called after each batch with the number of prompts it answered, for progress bars.
          share_pages: whether prompts about the same images share one pass over them. The answers are the same.
        """
        groups = group_prompts(prompts) if share_pages else [Group((i,), len(p.tokens)) for i, p in enumerate(prompts)]
        shards = 1 if self.mesh is None else num_batch_shards(self.mesh)
        # Views of the weights cost no memory, so they need not be kept.
        layers = unstack_layers(self.variables) if self.mesh is None else None
        answers: list = [None] * len(prompts)
        for batch in plan_batches(prompts, groups, batch_size=self.batch_size, shards=shards):
            options = DecodingOptions(
                max_new_tokens=max_new_tokens,
                end_ids=self.end_ids,
                pad_id=self.pad_id,
                views=prompts[batch.groups[0].prompts[0]].num_views,
            )
            answer = self._answer_branches if batch.num_branches else self._answer_alone
            for indices, rows in answer(prompts, batch, layers, options):
                for i, row in zip(indices, rows, strict=True):
                    answers[i] = first_answer(row, self.end_ids)
                if on_batch is not None:
                    on_batch(len(indices))
        return answers

    def _answer_alone(self, prompts: Sequence[Prompt], batch: PageBatch, layers, options: "DecodingOptions"):
        """Yields the indices of single prompts and their answers."""
        indices = [group.prompts[0] for group in batch.groups]
        # A prompt with K views takes K adjacent rows.
        rows = pad_prompts(
            [view for i in indices for view in prompts[i].views()],
            rows=options.views * batch.num_pages,
            tile_size=self.config.vision.image_size,
            pad_id=self.pad_id,
        )
        with self._on_mesh():
            decoded = self._fetch(greedy_decode(self._model, self.variables, self._place(rows), layers, options))
        # Rows beyond the prompts are padding.
        yield indices, decoded[: len(indices)]

    def _answer_branches(self, prompts: Sequence[Prompt], batch: PageBatch, layers, options: "DecodingOptions"):
        """Yields for each round the indices of the prompts and their answers. The pages are read only once."""
        rows = pad_pages(prompts, batch, tile_size=self.config.vision.image_size, pad_id=self.pad_id)
        with self._on_mesh():
            page = read_pages(self._model, self.variables, self._place(rows), layers)
        for indices_of_pages in batch.rounds():
            rows = pad_branches(prompts, batch, indices_of_pages, pad_id=self.pad_id)
            with self._on_mesh():
                decoded = self._fetch(
                    decode_branches(self._model, self.variables, page, self._place(rows), layers, options)
                )
            # Rows [P, Q]. Each page uses only its first rows.
            first_rows = range(0, len(decoded), batch.num_branches)
            used = [
                (i, decoded[first + branch])
                for first, indices in zip(first_rows, indices_of_pages, strict=False)
                for branch, i in enumerate(indices)
            ]
            yield tuple(zip(*used, strict=True))

    def _place(self, batch: Batch) -> Batch:
        return batch if self.mesh is None else sharding.shard_rows(batch, self.mesh)

    def _fetch(self, answers: Int[Array, "B A"]) -> Int[np.ndarray, "B A"]:
        if self.mesh is not None:
            # Replicated, so that every process gets all answers.
            answers = jax.device_put(answers, NamedSharding(self.mesh, PartitionSpec()))
        return np.asarray(answers)

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
        options = DecodingOptions(max_new_tokens, self.end_ids, self.pad_id, views)
        arrays, structure = jax.tree.flatten(self.variables)

        # Stacked layers, unlike in `generate`: for one prompt of a small model, the time to compile matters most.
        @jax.jit
        def answer(arrays, batch):
            return greedy_decode(self._model, jax.tree.unflatten(structure, arrays), batch, None, options)

        return answer.lower(arrays, batch).compile(), arrays

    @contextlib.contextmanager
    def _on_mesh(self) -> Iterator[None]:
        """Maps the model's logical axes to the axes of the mesh, if there is one."""
        if self.mesh is None:
            yield
        else:
            with jax.set_mesh(self.mesh), sharding.logical_rules():
                yield


class DecodingOptions(NamedTuple):
    """Settings of the decoding loop.

    Attributes:
      max_new_tokens: length A of the answers.
      end_ids: tokens that end an answer.
      pad_id: token that fills an answer after its end.
      views: number of views K of each prompt.
    """

    max_new_tokens: int
    end_ids: tuple[int, ...]
    pad_id: int
    views: int = 1


@functools.partial(jax.jit, static_argnames=("model", "options"))
@ordinary_modes()
def greedy_decode(
    model: AlignVLM,
    variables: Variables,
    batch: Batch,
    layers: tuple[Params, ...] | None,
    options: DecodingOptions,
) -> Int[Array, "B A"]:
    """Decodes answers of A ids to prompts that share nothing: up to and including the end token, then padding.

    Args:
      model: the model.
      variables: variables of the model.
      batch: batch of prompts with R rows; every K adjacent rows are the views of one prompt.
      layers: the decoder's weights from `unstack_layers`, with which a CPU decodes faster; None without them.
      options: settings of the loop.
    """
    # Prefill: the cache gets the whole prompt, and `logits` are those of each row's last position.
    rows, length = batch["tokens"].shape
    cache = empty_cache(model.config.language, rows, length + options.max_new_tokens)
    logits, cache = model.apply(variables, batch, cache, method="prefill")
    prompt_lengths = jnp.sum(batch["segment_ids"] > 0, axis=1)
    if layers is not None:
        variables, cache = with_layers(variables, layers), cache.unstack()
    answers = _decode(model, variables, logits, cache, prompt_lengths, prompt_lengths == 0, options)
    # All views of a prompt have the same answer, so every K-th row is enough.
    return answers[:: options.views]


@functools.partial(jax.jit, static_argnames="model")
@ordinary_modes()
def read_pages(model: AlignVLM, variables: Variables, batch: Batch, layers: tuple[Params, ...] | None) -> KVCache:
    """Returns the keys and values of pages.

    Args:
      model: the model.
      variables: variables of the model.
      batch: batch of pages, one per row; K adjacent rows are the views of one page.
      layers: as for `greedy_decode`. The cache is unstacked like them.
    """
    cache = empty_cache(model.config.language, *batch["tokens"].shape)
    # Nothing reads the output of the last layer, and XLA leaves it out, but not from a loop.
    is_unrolled = layers is not None and len(layers) <= MAX_UNROLLED_LAYERS
    if is_unrolled:
        variables, cache = with_layers(variables, layers), cache.unstack()
    _, cache = model.apply(variables, batch, cache, method="prefill")
    return cache if layers is None or is_unrolled else cache.unstack()


@functools.partial(jax.jit, static_argnames=("model", "options"))
@ordinary_modes()
def decode_branches(
    model: AlignVLM,
    variables: Variables,
    page: KVCache,
    batch: Batch,
    layers: tuple[Params, ...] | None,
    options: DecodingOptions,
) -> Int[Array, "B A"]:
    """Decodes answers of A ids to prompts that share pages, as `greedy_decode` does.

    Args:
      model: the model.
      variables: variables of the model.
      page: keys and values of P pages with K views each, from `read_pages`.
      batch: branches [P, K, Q] as rows: the branches of all views of a page are adjacent.
      layers: as for `greedy_decode`.
      options: settings of the loop.
    """
    rows, length = batch["tokens"].shape
    cache = empty_cache(model.config.language, rows, length + options.max_new_tokens)
    if layers is not None:
        variables, cache = with_layers(variables, layers), cache.unstack()
    logits, cache = model.apply(variables, batch, cache.replace(page=page), method="prefill_branches")
    branch_lengths = jnp.sum(batch["segment_ids"] > 0, axis=1)
    positions = batch["positions"][:, 0] + branch_lengths
    answers = _decode(model, variables, logits, cache, positions, branch_lengths == 0, options)
    # All views of a page give the same answers: [P K Q, A] -> [P Q, A].
    per_page = answers.reshape(-1, options.views, rows // page.filled.shape[0], options.max_new_tokens)
    return per_page[:, 0].reshape(-1, options.max_new_tokens)


def _decode(model, variables, logits, cache: KVCache, positions, is_padding, options: DecodingOptions):
    """Returns the answers [R, A] that continue the rows of a cache.

    Args:
      model: the model.
      variables: variables of the model.
      logits: scores [R, V] of the first token of each answer.
      cache: keys and values of everything before.
      positions: positions [R] of the first tokens.
      is_padding: rows [R] without a prompt. They have ended from the start, so that they do not keep the loop running.
      options: settings of the loop.
    """
    rows = len(positions)
    branches = 1 if cache.page is None else rows // cache.page.filled.shape[0]

    def unfinished(state):
        step, _, ended, _, _ = state
        return (step < options.max_new_tokens) & ~jnp.all(ended)

    def decode(state):
        step, token, ended, answers, cache = state
        # The end token itself is written; rows that have already ended get padding.
        answers = answers.at[:, step].set(jnp.where(ended, options.pad_id, token))
        ended |= jnp.isin(token, jnp.array(options.end_ids))
        # Positions continue from each row's own prompt, while the slot of the cache is the same for all rows.
        logits, cache = model.apply(variables, token, positions + step, cache, method="decode_step")
        return step + 1, _next_tokens(logits, options.views, branches), ended, answers, cache

    answers = jnp.full((rows, options.max_new_tokens), options.pad_id, jnp.int32)
    start = (0, _next_tokens(logits, options.views, branches), is_padding, answers, cache)
    return jax.lax.while_loop(unfinished, decode, start)[3]


def _in_loops(config: AlignVLMConfig) -> AlignVLMConfig:
    """Returns the config with a loop over the layers, also in a small model on a CPU (`hardware.unrolls_layers`).

    Unrolled layers are faster only in training. A loop compiles in less time, and its program is smaller. Nothing is
    recomputed without gradients.
    """

    def in_loop(part):
        return dataclasses.replace(part, remat=FULL) if part.remat == NONE else part

    return dataclasses.replace(config, vision=in_loop(config.vision), language=in_loop(config.language))


def _next_tokens(logits: Float[Array, "R V"], views: int, branches: int) -> Int[Array, " R"]:
    """Returns the most likely token of each row, by the mean log-probability over the views of its prompt."""
    if views == 1:
        return jnp.argmax(logits, axis=-1)
    # [B, K, Q, V] -> mean over views -> [B, Q], repeated for the K views.
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1).reshape(-1, views, branches, logits.shape[-1])
    tokens = jnp.argmax(log_p.mean(axis=1), axis=-1)
    return jnp.broadcast_to(tokens[:, None], log_p.shape[:3]).reshape(-1)
