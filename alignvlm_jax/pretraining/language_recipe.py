"""Trains the nano decoder: a Llama that answers questions about the text of a page, given as a grid of characters.

Axes: B pages, L positions, T patches of a page (all tiles, raster order), D model width, V vocabulary.

The decoder never sees an image. In place of the visual tokens of a page it reads the page's characters, one token per
patch, with blank patches as spaces. Then it answers questions and transcribes the page, in AlignVLM's chat format:

    <|begin|><|user|> T O T A L . . 4 8 . 2 0 ... What is the total?<|assistant|>48.20<|end|>

The output of a connector is never as clear as this. Some of the pages are therefore blurred: characters are missing,
and embeddings are mixed with the embeddings of other tokens.
"""

import dataclasses
from pathlib import Path

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.synthetic import draw_document
from alignvlm_jax.data.tiling import plan_tiles
from alignvlm_jax.interop.huggingface import save_language_folder
from alignvlm_jax.jax_modes import ordinary_modes
from alignvlm_jax.models.language import LanguageConfig, LanguageModel
from alignvlm_jax.pretraining.patches import CHARACTERS, patch_classes
from alignvlm_jax.pretraining.tokenizer import READING_INSTRUCTIONS, VOCAB_SIZE, save_tokenizer
from alignvlm_jax.pretraining.training import PretrainConfig, pretrain
from alignvlm_jax.pretraining.vision_recipe import NANO_TILING, NANO_VISION, TILES_PER_PAGE

NANO_LANGUAGE = LanguageConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    intermediate_size=384,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    rope_theta=10000.0,
    max_position_embeddings=1024,
)
LENGTH = 352

_BLURRED = 0.5  # share of pages that are blurred
_MISSING = 0.02  # share of characters missing on blurred pages
_MAX_MIXED = 0.4  # largest weight of the other token's embedding


def page_length() -> int:
    """Number of patches of a page, T."""
    return TILES_PER_PAGE * NANO_VISION.num_patches


def draw_conversation(rng: np.random.Generator, questions, answers, transcription) -> list[tuple[str, str]]:
    """Draws the turns about one page: its questions in random order, its transcription, or both."""
    reading = (READING_INSTRUCTIONS[rng.integers(len(READING_INSTRUCTIONS))], transcription)
    if rng.random() < 0.2:
        return [reading]
    turns = [(questions[i], answers[i]) for i in rng.permutation(len(questions))]
    return turns + [reading] if rng.random() < 0.6 else turns


def make_batches(config: PretrainConfig, chat: ChatTokenizer, split: str = "train") -> grain.MapDataset:
    """Returns batches of pages as text; element i is the batch of step i."""
    # Class 0, a blank patch, is read as a space.
    token_of_class = np.array([chat.encode_text(character)[0] for character in " " + CHARACTERS], np.int32)

    def draw(index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((config.seed, index))
        document = draw_document(config.seed, split, index, render=False)
        plan = plan_tiles(*document.size, NANO_TILING)
        classes = patch_classes(document, plan, NANO_TILING.tile_size, NANO_VISION.patch_size).reshape(-1)
        # Blur some pages: drop characters, and draw the weight of another token's embedding at each position.
        mixed = np.zeros(LENGTH, np.float32)
        if rng.random() < _BLURRED:
            classes = np.where(rng.random(classes.shape) < _MISSING, 0, classes)
            mixed[:] = rng.uniform(0, _MAX_MIXED) * rng.random(LENGTH)

        # Tokenize a conversation about the page, as in the training of AlignVLM.
        turns = draw_conversation(rng, document.questions, document.answers, document.transcription)
        messages = []
        for number, (question, answer) in enumerate(turns):
            content = [{"type": "image"}] * (number == 0) + [{"type": "text", "text": question}]
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        encoded = chat.encode(messages, [page_length()])

        # One position more than L, because the targets are the tokens shifted by one.
        tokens = np.full(LENGTH + 1, chat.pad_id, np.int32)
        length = min(len(encoded.tokens), LENGTH + 1)
        tokens[:length] = encoded.tokens[:length]
        on_page = np.zeros(LENGTH + 1, bool)
        on_page[:length] = encoded.visual_index[:length] >= 0
        tokens[on_page] = token_of_class[classes]  # the page's characters instead of image placeholders
        weights = np.zeros(LENGTH + 1, np.float32)
        weights[:length] = encoded.loss_weights[:length]
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "loss_weights": weights[:-1],
            "segment_ids": (np.arange(LENGTH) < length).astype(np.int32),
            "other_tokens": rng.choice(token_of_class, LENGTH).astype(np.int32),
            "mixed": np.where(on_page[:-1], mixed, 0.0).astype(np.float32),
        }

    pages = grain.MapDataset.range(config.steps * config.batch_size)
    return pages.map(draw).batch(config.batch_size, drop_remainder=True)


class PageDecoder(nn.Module):
    """Decoder whose input embeddings are mixed with the embeddings of other tokens, as on blurred pages."""

    config: LanguageConfig

    def setup(self):
        """Creates the decoder."""
        self.language = LanguageModel(self.config)

    def __call__(self, batch):
        """Returns the logits [B, L, V] of a batch of pages."""
        weight = batch["mixed"][..., None]
        inputs = (1 - weight) * self.language.embed(batch["tokens"])
        inputs += weight * self.language.embed(batch["other_tokens"])
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape[:2])
        hidden, _ = self.language(inputs, positions=positions, segment_ids=batch["segment_ids"])
        return self.language.logits(hidden)


@ordinary_modes()
def make_language_backbone(out: str | Path, workdir: str | Path, config: PretrainConfig) -> dict[str, float]:
    """Trains the tokenizer and the decoder, writes both, and returns the accuracy on validation pages."""
    save_tokenizer(out, seed=config.seed)
    chat = ChatTokenizer.from_folder(out)
    model = PageDecoder(NANO_LANGUAGE)
    batches = make_batches(config, chat)
    example = jax.tree.map(jnp.asarray, batches[0])
    params = nn.unbox(model.init(jax.random.key(config.seed), example)["params"])

    def loss_fn(params, batch):
        logits = model.apply({"params": params}, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        right = jnp.argmax(logits, -1) == batch["targets"]
        weights, weight = batch["loss_weights"], jnp.sum(batch["loss_weights"])
        return jnp.sum(weights * losses) / weight, {"token_accuracy": jnp.sum(weights * right) / weight}

    params = pretrain("language", config, params, loss_fn, batches, workdir)
    ids = {"bos_token_id": chat.token_to_id("<|begin|>"), "eos_token_id": chat.token_to_id("<|end|>")}
    ids["pad_token_id"] = chat.pad_id
    save_language_folder(out, NANO_LANGUAGE, params["language"], special_tokens=ids)

    validation = make_batches(
        dataclasses.replace(config, steps=config.validation_pages // config.batch_size), chat, split="validation"
    )
    scores = [jax.jit(loss_fn)(params, batch)[1] for batch in validation]
    return {key: float(np.mean([score[key] for score in scores])) for key in scores[0]}
