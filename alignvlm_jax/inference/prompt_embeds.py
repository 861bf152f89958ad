"""Prompts as the vectors that the decoder reads, for engines that run the decoder alone.

Axes: L positions of one prompt, D decoder width.

vLLM, SGLang and others serve a plain Llama and accept its inputs as vectors in place of token ids. Encoder and
connector then run here, the decoder there (the folder of `tools/export_pytorch.py --language-only`):

    reader = alignvlm_jax.load("runs/demo/checkpoint")
    prompts = reader.prompts("page.png", ["What is the total?"])
    (vectors,) = prompt_embeds(reader.generator, prompts)

`docs/pytorch.md` has the other side.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float32

from alignvlm_jax.inference.generate import Generator, Prompt, pad_prompts
from alignvlm_jax.inference.vocabulary import Variables
from alignvlm_jax.models.alignvlm import AlignVLM, Batch


def prompt_embeds(generator: Generator, prompts: Sequence[Prompt]) -> list[Float32[np.ndarray, "L D"]]:
    """Embeds text and puts the visual tokens in their places; all prompts are read as one batch."""
    config = generator.config
    batch = pad_prompts(prompts, rows=len(prompts), tile_size=config.vision.image_size, pad_id=generator.pad_id)
    vectors = np.asarray(_embed(AlignVLM(config), generator.variables, batch), np.float32)
    return [row[: len(prompt.tokens)] for row, prompt in zip(vectors, prompts, strict=True)]


@functools.partial(jax.jit, static_argnames="model")
def _embed(model: AlignVLM, variables: Variables, batch: Batch) -> Array:
    def embed(module: AlignVLM, batch: Batch) -> Array:
        visual, _ = module.encode_images(batch["tiles"], batch["tile_valid_hw"])
        return module.merge(batch, visual)

    return model.apply(variables, batch, method=embed)
