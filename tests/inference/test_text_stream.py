"""Streamed text equals the text of all tokens, piece by piece, for several styles of tokenizers."""

import json

import numpy as np
import pytest

from alignvlm_jax import backbones
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.inference.text_stream import TextStream
from tests.interop.tokenizer_styles import write_style


@pytest.fixture(scope="module", params=["nano", "llama3", "smollm2", "tinyllama", "llama2_new"])
def tokenizer(request, tmp_path_factory) -> ChatTokenizer:
    if request.param == "nano":
        return ChatTokenizer.from_folder(backbones.trained_model("nano"))
    folder = write_style(tmp_path_factory.mktemp(request.param), request.param)
    return with_image_token(folder)


def with_image_token(folder) -> ChatTokenizer:
    """Reads a folder whose configuration names one of its special tokens as the image's."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["image_token"] = config["bos_token"]
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    return ChatTokenizer((folder / "tokenizer.json").read_text(), config, template)


def pieces_of(tokenizer, tokens, stop=()):
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(token) for token in tokens]
    return [*pieces, stream.finish()], stream


def cut(text, stop):
    """Returns the text up to the first stop text."""
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]


def test_pieces_of_random_tokens_are_the_text_of_all(tokenizer):
    rng = np.random.default_rng(0)
    for trial in range(150):
        tokens = rng.integers(0, tokenizer.vocab_size, rng.integers(1, 30)).tolist()
        text = tokenizer.decode(tokens)
        pieces, _ = pieces_of(tokenizer, tokens)
        assert "".join(pieces) == text
        if len(text) > 3:
            start = rng.integers(0, len(text) - 1)
            stop = (text[start : start + 1 + trial % 3], "never")
            pieces, stream = pieces_of(tokenizer, tokens, stop)
            assert "".join(pieces) == cut(text, stop)
            assert stream.has_stopped and pieces[-1] == "" or stream.finish() == ""


def test_real_text_arrives_in_whole_characters(tokenizer):
    text = "Total: 12.50 €, grüße 漢字 👍🏽  two spaces\n"
    tokens = tokenizer.encode_text(text).tolist()
    pieces, _ = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert "\ufffd" not in "".join(pieces)
    # Most of the text comes before the end.
    assert len("".join(pieces[: len(tokens) * 3 // 4])) > len(text) // 4


def test_the_beginning_of_a_stop_text_is_held_back(tokenizer):
    tokens = tokenizer.encode_text("12 EUR").tolist()
    pieces, stream = pieces_of(tokenizer, tokens, ("EURO",))
    assert "".join(pieces) == tokenizer.decode(tokens) and not stream.has_stopped
    assert "E" not in "".join(pieces[:-1]) and "EUR" in pieces[-1]
    pieces, stream = pieces_of(tokenizer, tokens * 2, ("EUR", "UR"))
    assert "".join(pieces) == cut(tokenizer.decode(tokens * 2), ("EUR",)) and stream.has_stopped
    assert stream.push(tokens[0]) == stream.finish() == ""


def test_no_tokens_and_unknown_ones(tokenizer):
    assert pieces_of(tokenizer, [])[0] == [""]
    assert pieces_of(tokenizer, [tokenizer.end_ids[0], tokenizer.vocab_size + 7])[0] == ["", "", ""]
