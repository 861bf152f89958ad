"""Tiny readers and pages for the tests of the analyses: random weights, documents of the synthetic corpus."""

import functools
import pathlib
import tempfile

import jax
import numpy as np

from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.synthetic.records import draw_records
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.evaluation.report import Answer, Report
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.models.alignvlm import AlignVLM, AlignVLMConfig, random_parameters
from alignvlm_jax.models.connectors import AlignConfig, ConnectorConfig
from alignvlm_jax.models.language import LanguageConfig
from alignvlm_jax.models.vision import VisionConfig
from tests.data.nano_tokenizer import write_chat_folder


@functools.cache
def tokenizer() -> ChatTokenizer:
    """Returns the tokenizer of all tiny readers."""
    with tempfile.TemporaryDirectory() as folder:
        return ChatTokenizer.from_folder(write_chat_folder(pathlib.Path(folder)))


@functools.cache
def records(pages: int = 6) -> list[dict]:
    """Returns the first held-out documents of the corpus."""
    return draw_records(0, "heldout", 0, pages)


def random_reader(connector: ConnectorConfig | None = None, *, batch_size: int = 4) -> Reader:
    """Returns a reader whose random weights are large enough for patches, words and answers to differ."""
    connector = connector or AlignConfig(vocab_scale_init=2.0)
    config = AlignVLMConfig(
        vision=VisionConfig(
            image_size=24, patch_size=8, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2
        ),
        connector=connector,
        language=LanguageConfig(
            vocab_size=tokenizer().vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_layers=1,
            num_heads=4,
            num_kv_heads=2,
            max_position_embeddings=256,
        ),
    )

    def draw(rng):
        return jax.tree.map(lambda leaf: leaf * 3, random_parameters(config, rng))

    params = jax.jit(draw)(jax.random.key(0))
    tiling = TilingConfig(tile_size=24, max_tiles=4, thumbnail=False)
    return Reader(config, params, tokenizer(), tiling, batch_size=batch_size)


def features_of(reader: Reader, tiles: np.ndarray, valid_hw: np.ndarray) -> np.ndarray:
    """Returns the connector's input, [M, N, d]."""
    return np.asarray(_features(AlignVLM(reader.config), reader.generator.variables, tiles, valid_hw))


@functools.partial(jax.jit, static_argnums=0)
def _features(model, variables, tiles, valid_hw):
    return model.apply(variables, tiles, valid_hw, method="encode_features")


def report_of_ten(num_right: int) -> Report:
    """Returns the report of ten questions, `num_right` of which are answered right."""
    answers = [Answer("page", "form", "font", "q", "1", "1" if number < num_right else "2") for number in range(10)]
    return Report(answers, (), "none", 0.0)
