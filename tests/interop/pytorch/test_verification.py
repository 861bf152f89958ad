"""The same page through a model in JAX and in PyTorch, as `--verify` compares them; a wrong weight is noticed."""

import io

import torch

from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.inference.verification import Comparison, answer_in_jax, answer_in_pytorch
from tests.interop.pytorch.folders import TILING, random_image


def test_equal_models_are_verified_and_a_wrong_weight_is_noticed(pair):
    pair = pair("align", tied=False)
    stream = io.BytesIO()
    random_image(0, 30, 50).save(stream, "PNG")
    page, question = stream.getvalue(), "What is the total?"
    in_jax = answer_in_jax(Reader(pair.config, pair.params, pair.chat, TILING, batch_size=1), page, question)
    assert len(in_jax.logits) == len(in_jax.answer_ids) + 1

    def compare():
        in_pytorch = answer_in_pytorch(pair.model, pair.processor, page, question, in_jax.answer_ids)
        return Comparison(question, in_jax, in_pytorch)

    comparison = compare()
    assert comparison.problems == [] and comparison.difference < 1e-4
    assert comparison.describe().endswith("verified: the same")
    weight = pair.model.model.connector.w1.weight
    with torch.no_grad():
        weight *= 1.1
    try:
        assert "the logits differ by more than the tolerance" in compare().problems
    finally:
        with torch.no_grad():
            weight /= 1.1
