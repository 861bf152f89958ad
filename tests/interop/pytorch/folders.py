"""Writes tiny AlignVLM models as folders for PyTorch, and prepares the same inputs for JAX."""

import json
import pathlib
from collections.abc import Iterator

import flax.linen as nn
import jax
import numpy as np
import PIL.Image
import safetensors.numpy
import torch
from flax.traverse_util import flatten_dict

from alignvlm_jax.data import images
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.tiling import TilingConfig, cut_tiles, plan_tiles
from alignvlm_jax.inference.generate import Prompt
from alignvlm_jax.interop import export, tables
from alignvlm_jax.interop.pytorch import REMOTE_CODE_FILES, remote_code
from alignvlm_jax.interop.tokenizer import export_tokenizer
from alignvlm_jax.models.alignvlm import AlignVLMConfig, parameter_shapes, tokens_per_tile
from alignvlm_jax.models.connectors import (
    AlignConfig,
    CAbstractorConfig,
    HReducerConfig,
    MLPConfig,
    OvisConfig,
    PerceiverConfig,
)
from tests.data.nano_tokenizer import write_chat_folder
from tests.tiny_models import tiny_language, tiny_vision

TILING = TilingConfig(tile_size=20, max_tiles=4)
CONNECTORS = {
    "align": AlignConfig(vocab_size=330),  # Fewer words than rows of the embedding table.
    "mlp": MLPConfig(),
    "perceiver": PerceiverConfig(num_latents=5, depth=2, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=20),
    "ovis": OvisConfig(num_words=50),
    "h_reducer": HReducerConfig(window=4),
    "c_abstractor": CAbstractorConfig(num_tokens=4, depth=2, hidden_size=20),
}


def make_config(connector: str = "align", tied: bool = True) -> AlignVLMConfig:
    """Returns a config with 3 x 3 patches per tile, two unused pixels, and an embedding table of 352 rows."""
    return AlignVLMConfig(
        vision=tiny_vision(20, patch_size=6, hidden_size=24, intermediate_size=40, num_layers=2),
        connector=CONNECTORS[connector],
        language=tiny_language(
            352,
            intermediate_size=48,
            num_layers=3,
            head_dim=8,
            rope_theta=1e4,
            tie_word_embeddings=tied,
            max_position_embeddings=512,
        ),
    )


def make_params(config: AlignVLMConfig) -> dict:
    """Returns random values for every leaf; ALIGN's P is peaked, because a flat P would hide mistakes."""
    params = nn.unbox(parameter_shapes(config))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = "/".join(str(key.key) for key in path)
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if name.endswith("scale"):
            return 4.0 + noise if "vocab_norm" in name else 1.0 + 0.2 * noise
        if name.startswith("vision"):
            # Larger than usual, so that a random encoder distinguishes patches.
            return noise * (0.3 if leaf.ndim > 1 else 0.2)
        # Larger than usual, because otherwise a decoder with a tied head only repeats its last token.
        return noise * (1.5 * leaf.shape[-2] ** -0.5 if name.endswith("kernel") else 0.3)

    return jax.tree_util.tree_map_with_path(draw, params)


def write_folder(
    folder: pathlib.Path, config: AlignVLMConfig, params: dict, tiling: TilingConfig = TILING
) -> pathlib.Path:
    """Writes the same folder as `interop/export.py`, from a config and parameters instead of a checkpoint."""
    chat_folder = write_chat_folder(folder.parent / f"{folder.name}_chat")
    folder.mkdir(parents=True)
    export_tokenizer(chat_folder, folder)
    for name in REMOTE_CODE_FILES:
        (folder / name).write_text(remote_code(name), encoding="utf-8")
    chat = ChatTokenizer.from_folder(chat_folder)
    ids = {
        "bos_token_id": chat.token_to_id("<|begin|>"),
        "eos_token_id": list(chat.end_ids),
        "pad_token_id": chat.pad_id,
    }
    contents = {
        "config.json": export.alignvlm_config(config, dtype="float32", image_token_id=chat.image_id, special_ids=ids),
        "processor_config.json": export.processor_config(config, tiling, "<|image|>"),
        "generation_config.json": ids,
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    safetensors.numpy.save_file(state_dict(config, params), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def state_dict(config: AlignVLMConfig, params: dict) -> dict[str, np.ndarray]:
    """Converts parameters, or a tree like them such as gradients, to PyTorch's names and layouts."""
    flat = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(params).items()}
    tensors = {}
    for row in tables.alignvlm(config):
        for layer in range(len(flat[row.path])) if "{layer}" in row.key else [()]:
            tensor = row.transform.to_torch(flat[row.path][layer])
            tensors[row.key.format(layer=layer)] = np.ascontiguousarray(tensor)
    return tensors


def random_image(seed: int, width: int, height: int) -> PIL.Image.Image:
    """Returns an image of random blocks, so that patches differ from each other."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (-(-height // 4), -(-width // 4), 3), np.uint8)
    return PIL.Image.fromarray(small).resize((width, height), PIL.Image.Resampling.NEAREST)


def make_prompt(config: AlignVLMConfig, chat: ChatTokenizer, messages: list[dict]) -> Prompt:
    """Returns the JAX reader's prompt for a conversation; its image parts have the form {"image": image}."""
    per_image = list(tiles_of(messages))
    counts = [len(tiles) * tokens_per_tile(config) for tiles, _ in per_image]
    encoded = chat.encode_prompt(messages, counts)
    tiles = [np.zeros((0, 20, 20, 3), np.uint8), *(tiles for tiles, _ in per_image)]
    valid_hw = [np.zeros((0, 2), np.int32), *(valid_hw for _, valid_hw in per_image)]
    return Prompt(encoded.tokens, encoded.visual_index, np.concatenate(tiles), np.concatenate(valid_hw))


def tiles_of(messages: list[dict]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the tiles of each image of a conversation and the sizes of their valid parts."""
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if part["type"] == "image":
                image = images.to_rgb(part["image"])
                yield cut_tiles(image, plan_tiles(*image.size, TILING), TILING.tile_size)


def ask(text: str, *pages: PIL.Image.Image) -> list[dict]:
    """Returns a conversation with one question about the pages."""
    parts = [{"type": "image", "image": page} for page in pages]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def relative_error(ours, theirs) -> float:
    """Returns the largest difference divided by the largest value."""
    ours = np.asarray(ours.detach().numpy() if isinstance(ours, torch.Tensor) else ours, np.float64)
    theirs = np.asarray(theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
