"""Packed data are exact within the errors that packing.py states, and the file stays small."""

import json
import math

import numpy as np
import pytest

from alignvlm_jax.inspector import packing, page
from tests.inspector.samples import nine_tiles


def unpack(text: dict) -> list[list[tuple[str, float]]]:
    """Returns the (word, probability) pairs of each patch, decoded as in web/data.js."""
    entries = packing.decode(text["entries"], "<u2" if len(text["words"]) <= 65536 else "<u4")
    probabilities = np.exp(packing.decode(text["probabilities"], "<u2") / 65535 * text["lowest"])
    counts = packing.decode(text["counts"], "<u2").astype(int)
    pairs = [(text["words"][word], p) for word, p in zip(entries, probabilities, strict=True)]
    return [pairs[end - count : end] for end, count in zip(np.cumsum(counts), counts, strict=True)]


def test_words_and_probabilities_round_trip():
    rng = np.random.default_rng(0)
    probabilities = np.sort(rng.dirichlet(np.full(40, 0.05), 50))[:, ::-1][:, :12]
    ids = np.stack([rng.permutation(500)[:12] for _ in range(50)])
    entropy = rng.uniform(0, math.log(500), 50)
    text = packing.pack_words(ids, probabilities, entropy, vocabulary=500, token_text=str)
    assert json.loads(json.dumps(text)) == text
    for pairs, words, shares in zip(unpack(text), ids, probabilities, strict=True):
        kept = shares >= packing.FLOOR
        assert 1 <= kept.sum() and [word for word, _ in pairs] == [str(word) for word in words[kept]]
        # Logarithms of probabilities are rounded to a grid of 65535 steps.
        np.testing.assert_allclose([share for _, share in pairs], shares[kept], rtol=1.3e-4)
    assert sum(map(len, unpack(text))) < ids.size, "the sample must have words below the floor"
    np.testing.assert_allclose(
        packing.decode(text["entropy"], "<u2") / 65535 * math.log(500), entropy, atol=math.log(500) / 65535
    )
    assert text["words"] == [str(word) for word in packing.decode(text["ids"], "<u4")]


def test_the_likeliest_word_of_a_patch_is_kept_below_the_floor():
    text = packing.pack_words(
        np.array([[3, 5]]), np.array([[8e-6, 7e-6]]), np.array([11.7]), vocabulary=128256, token_text=str
    )
    ((only,),) = unpack(text)
    assert only[0] == "3" and only[1] == pytest.approx(8e-6, rel=2e-4)


def test_the_floor_rises_if_there_are_too_many_entries(monkeypatch):
    monkeypatch.setattr(packing, "MAX_ENTRIES", 200)
    probabilities = np.sort(np.random.default_rng(0).dirichlet(np.full(30, 0.3), 50))[:, ::-1]
    text = packing.pack_words(
        np.tile(np.arange(30), (50, 1)), probabilities, np.zeros(50), vocabulary=500, token_text=str
    )
    # A few more than 200, because every patch keeps its likeliest word.
    assert text["floor"] > packing.FLOOR and 200 <= sum(map(len, unpack(text))) <= 250
    for pairs, dense in zip(unpack(text), probabilities, strict=True):
        assert len(pairs) == max(1, np.sum(dense >= text["floor"]))


def test_maps_keep_their_sign_and_scale():
    maps = np.random.default_rng(0).normal(size=(3, 200)) * np.array([[1e-3], [1], [40]])
    packed = packing.pack_maps(maps)
    values = packing.decode(packed["values"], "<i2").reshape(3, 200) / 32767 * np.array(packed["scales"])[:, None]
    assert np.all(np.abs(values - maps) <= np.max(np.abs(maps), axis=1, keepdims=True) / 65534 * 1.01)
    assert not packing.decode(packing.pack_maps(np.zeros((1, 5)))["values"], "<i2").any()


def test_the_largest_page_is_below_four_megabytes():
    """All 32 words of each patch are kept, and nearly every word of the vocabulary occurs."""
    data = nine_tiles().to_json()
    assert len(data["text"]["words"]) > 65536 and packing.decode(data["text"]["counts"], "<u2").sum() == 7290 * 32
    text = page.render(data, title="nine tiles")
    assert 3e6 < len(text.encode()) < 4e6
