"""The trained nano model gives the same answers when questions share their page as with every prompt alone.

`tests/interop/test_trained_nano.py` compares a part of them with PyTorch's, which are all alone.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from alignvlm_jax.data.synthetic import draw_document
from alignvlm_jax.inference.prompts import pad_prompts
from alignvlm_jax.inference.reader import load
from alignvlm_jax.models.alignvlm import AlignVLM

_NEW_TOKENS = 32
_MARGIN = 1e-4  # If the reference's two best logits differ by less, either choice is right.
_MAX_OTHER_CHOICES = 2


def _margin(reader, prompt, answer) -> float:
    """Returns the difference of the two best logits after a prompt and the beginning of its answer."""
    count = len(answer)
    tokens = np.concatenate([prompt.tokens, answer])
    visual_index = np.pad(prompt.visual_index, (0, count), constant_values=-1)
    prompt = dataclasses.replace(prompt, tokens=tokens, visual_index=visual_index)
    batch = pad_prompts([prompt], rows=1, tile_size=reader.tiling.tile_size, pad_id=reader.tokenizer.pad_id)
    logits = jax.jit(AlignVLM(reader.config).apply)(reader.generator.variables, batch).logits
    best = np.sort(np.asarray(logits)[0, len(tokens) - 1])[-2:]
    return float(best[1] - best[0])


def _other_choices(reader, prompts, expected, answers) -> list[str]:
    """Returns a line for each answer that differs where the reference has no clear choice; fails for any other."""
    lines = []
    for prompt, ours, theirs in zip(prompts, answers, expected, strict=True):
        if not np.array_equal(ours, theirs):
            same = next(i for i, pair in enumerate(itertools.zip_longest(ours, theirs)) if pair[0] != pair[1])
            margin = _margin(reader, prompt, theirs[:same])
            texts = [reader.tokenizer.decode(answer) for answer in (prompt.tokens, theirs, ours)]
            lines.append(f"{texts[0]!r}: {texts[1]!r} alone, {texts[2]!r} with shared pages, margin {margin:.1e}")
            assert margin < _MARGIN, lines[-1]
    return lines


@pytest.mark.large
def test_the_answers_are_those_of_every_prompt_alone_in_any_order():
    reader = load("nano")
    prompts = []
    for index in range(300):
        document = draw_document(0, "heldout", index)
        prompts += reader.prompts(document.image, document.questions)
    assert len(prompts) == 1049
    expected = reader.generator.generate(prompts, _NEW_TOKENS, share_pages=False)
    order = np.random.default_rng(0).permutation(len(prompts))
    shuffled = reader.generator.generate([prompts[i] for i in order], _NEW_TOKENS)
    results = {"in order": reader.generator.generate(prompts, _NEW_TOKENS)}
    results["shuffled"] = [shuffled[i] for i in np.argsort(order)]
    for name, answers in results.items():
        others = _other_choices(reader, prompts, expected, answers)
        print(f"{name}: {len(prompts) - len(others)} of {len(prompts)} answers are the same", *others, sep="\n  ")
        assert len(others) <= _MAX_OTHER_CHOICES
