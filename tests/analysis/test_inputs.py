"""Tests that pages are found in both documents and conversations."""

import json

import numpy as np
import pytest

from alignvlm_jax.analysis.geometry.measure import visual_tokens
from alignvlm_jax.analysis.inputs import page_indices
from alignvlm_jax.analysis.noise.corruptions import CorruptedRecords, Corruption
from alignvlm_jax.analysis.noise.measure import feature_noise
from alignvlm_jax.analysis.vocabulary.measure import vocabulary_use
from alignvlm_jax.data import images
from alignvlm_jax.errors import UserError
from tests.analysis.tiny import random_reader, records


def conversations():
    """Returns four pages of `records` as conversations of `alignvlm prepare`, with 0, 1, 0 and 3 pages."""
    pages = [record["image"] for record in records()[:4]]
    found = []
    for number, shown in enumerate(([], pages[:1], [], pages[1:])):
        question = [*({"type": "image"} for _ in shown), {"type": "text", "text": "What is the total?"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "12"}]
        found.append({"id": str(number), "source": "said", "conversation": json.dumps(messages), "images": shown})
    return found


def test_conversations_have_the_pages_of_documents():
    reader = random_reader()
    tokens, use = visual_tokens(reader, conversations(), 3), vocabulary_use(reader, conversations(), pages=3)
    np.testing.assert_array_equal(tokens, visual_tokens(reader, records(), 3))
    np.testing.assert_array_equal(use.mean, vocabulary_use(reader, records(), pages=3).mean)
    assert use.pages == 3 and len(page_indices(conversations(), 50)) == 4


def test_noise_of_conversations():
    corrupted = CorruptedRecords(conversations(), Corruption("blur", 2.0), seed=0)
    for record, found in zip(conversations(), corrupted, strict=True):
        assert {**found, "images": None} == {**record, "images": None}
        for page, blurred in zip(record["images"], found["images"], strict=True):
            expected = Corruption("blur", 2.0).apply(images.open_image(page), np.random.default_rng(0))
            assert images.open_image(blurred).tobytes() == expected.tobytes()
    points = feature_noise(random_reader(), conversations(), [0.0, 2.0], pages=2)
    assert [point.questions for point in points] == [4, 4]


def test_records_without_pages_are_refused():
    with pytest.raises(UserError, match="none of the 2 records has an image"):
        vocabulary_use(random_reader(), conversations()[::2], pages=3)
