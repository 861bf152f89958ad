"""Prompts as input vectors of the decoder, for engines that run only the decoder.

Axes: L positions of one prompt, D decoder width.

vLLM serves a plain Llama and accepts vectors in place of token ids, as other engines may do. The encoder and the
connector then run here, and the decoder in the engine, from the folder that `alignvlm export --language-only`
writes:

    reader = alignvlm_jax.load("runs/demo/checkpoint")
    prompts = reader.prompts("page.png", ["What is the total?"])
    (vectors,) = prompt_embeds(reader.generator, prompts)

`docs/pytorch.md` describes the engine's side.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float32

from alignvlm_jax.inference.generate import Generator, Prompt, pad_prompts
from alignvlm_jax.inference.vocabulary import Variables
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.alignvlm import AlignVLM, Batch


@ordinary_modes()
def prompt_embeds(generator: Generator, prompts: Sequence[Prompt]) -> list[Float32[np.ndarray, "L D"]]:
    """Returns the input vectors of each prompt: embedded text, with the visual tokens in their places.

    All prompts are processed as one batch.
    """
    config = generator.config
    batch = pad_prompts(prompts, rows=len(prompts), tile_size=config.vision.image_size, pad_id=generator.pad_id)
    vectors = np.asarray(_embed(AlignVLM(config), generator.variables, batch), np.float32)
    # Remove the padding of the batch.
    return [row[: len(prompt.tokens)] for row, prompt in zip(vectors, prompts, strict=True)]


@functools.partial(jax.jit, static_argnames="model")
def _embed(model: AlignVLM, variables: Variables, batch: Batch) -> Array:
    def embed(module: AlignVLM, batch: Batch) -> Array:
        visual, _ = module.encode_images(batch["tiles"], batch["tile_valid_hw"])
        return module.merge(batch, visual)

    return model.apply(variables, batch, method=embed)
