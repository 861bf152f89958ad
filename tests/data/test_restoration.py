"""Covered text: the same lines twice, more of them visible in the easy version, and nothing else changed."""

import numpy as np
import pytest

from alignvlm_jax.data import store
from alignvlm_jax.data.synthetic import split_of
from alignvlm_jax.data.synthetic.restoration import (
    build_restoration_corpus,
    draw_restoration,
    glyphs_by_line,
)
from alignvlm_jax.evaluation.metrics import vcr_scores


@pytest.mark.parametrize("index", range(12))
def test_bars_cover_the_answer_and_nothing_else(index):
    easy, question, answer = draw_restoration(3, "train", index, "easy")
    hard, *same = draw_restoration(3, "train", index, "hard")
    assert [question, answer] == same and (question, answer) in zip(easy.questions, easy.answers, strict=True)
    changed = np.any(np.asarray(easy.image) != np.asarray(hard.image), axis=-1)
    inside = np.zeros_like(changed)
    for line, glyphs in zip(easy.lines, glyphs_by_line(easy), strict=True):
        if answer in line:
            start = len(line[: line.index(answer)].replace(" ", ""))
            for glyph in glyphs[start : start + len(answer.replace(" ", ""))]:
                inside[round(glyph.top) : round(glyph.bottom) + 1, round(glyph.left) : round(glyph.right) + 1] = True
    assert changed.any() and not (changed & ~inside).any()


def test_most_answers_are_printed_once():
    """An answer printed twice is covered twice, so that it cannot be copied from elsewhere on the page."""
    counts = []
    for index in range(100):
        document, _, answer = draw_restoration(3, "train", index, "easy")
        counts.append(sum(line.count(answer) for line in document.lines))
    assert min(counts) >= 1 and np.mean(np.equal(counts, 1)) > 0.9


def test_hard_leaves_less_ink():
    def ink(difficulty):
        images = [np.asarray(draw_restoration(3, "train", i, difficulty)[0].image, float) for i in range(20)]
        return sum(float((np.median(image) - image).clip(20).sum()) for image in images)

    assert ink("hard") < ink("easy")


def test_values_belong_to_their_split():
    for index in range(20):
        document, _, _ = draw_restoration(3, "heldout", index, "easy")
        assert all(split_of(answer) == "heldout" for answer in document.answers if any(c.isdigit() for c in answer))


def test_correct_answer_has_the_full_score():
    _, _, answer = draw_restoration(3, "train", 0, "easy")
    assert vcr_scores(answer, [answer], "en") == ([1.0], [1.0])


def test_the_data_set(tmp_path):
    folder = build_restoration_corpus(tmp_path / "pages", seed=3, sizes={"train": 6, "heldout": 2}, progress=False)
    records = store.open_dataset(folder, "train")
    assert [records[i]["source"] for i in range(6)] == ["easy", "hard"] * 3
    for i in range(0, 6, 2):
        assert records[i]["answers"] == records[i + 1]["answers"] and records[i]["image"] != records[i + 1]["image"]
        assert len(records[i]["questions"]) == len(records[i]["answers"]) == 1
