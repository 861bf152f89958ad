"""Synthetic documents: reproducible, with correct glyph boxes, and without leaks into the held-out split."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax.data.synthetic import (
    CHARACTERS,
    FAMILIES,
    HELD_OUT_FONT,
    SPLITS,
    TRAINING_FONTS,
    draw_document,
    split_of,
)
from alignvlm_jax.data.synthetic.fonts import advance_range, get_face
from alignvlm_jax.data.synthetic.records import draw_records
from alignvlm_jax.errors import UserError

_MANY = {"train": 2500, "validation": 600, "heldout": 1200}


@pytest.fixture(scope="module")
def layouts():
    """Thousands of documents of each split, without their images."""
    return {split: [draw_document(0, split, i, render=False) for i in range(count)] for split, count in _MANY.items()}


@pytest.fixture(scope="module")
def pages():
    return [draw_document(5, "heldout", i) for i in range(120)]


def test_a_document_is_a_function_of_seed_split_and_index():
    first, again = draw_document(3, "train", 7), draw_document(3, "train", 7)
    assert np.array_equal(first.image, again.image)
    assert first.transcription == again.transcription and first.glyphs == again.glyphs
    others = draw_document(4, "train", 7), draw_document(3, "validation", 7), draw_document(3, "train", 8)
    assert len({document.transcription for document in (first, *others)}) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_document_without_image_is_otherwise_the_same(family):
    drawn = draw_document(1, "train", 2, family=family)
    laid_out = draw_document(1, "train", 2, family=family, render=False)
    assert laid_out.image is None
    for field in ("id", "family", "font", "glyphs", "lines", "transcription", "questions", "answers"):
        assert getattr(drawn, field) == getattr(laid_out, field)


def test_another_process_draws_the_same():
    """Hashes of strings differ between processes; a document must not depend on them."""
    program = "from alignvlm_jax.data.synthetic import draw_document as d; print(d(9, 'heldout', 4, render=False))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(draw_document(9, "heldout", 4, render=False))


def test_every_family_and_font_is_drawn(layouts):
    for split, documents in layouts.items():
        assert {document.family for document in documents} == set(FAMILIES)
        assert {document.font for document in documents} >= set(TRAINING_FONTS), split


def test_one_font_is_kept_for_the_held_out_set(layouts):
    assert HELD_OUT_FONT not in TRAINING_FONTS and len(TRAINING_FONTS) >= 4
    for split in ("train", "validation"):
        assert all(document.font != HELD_OUT_FONT for document in layouts[split])
        with pytest.raises(UserError, match=HELD_OUT_FONT):
            draw_document(0, split, 0, font=HELD_OUT_FONT)
    share = np.mean([document.font == HELD_OUT_FONT for document in layouts["heldout"]])
    assert 1 / 8 < share < 1 / 4
    assert draw_document(0, "heldout", 0, font=HELD_OUT_FONT, render=False).font == HELD_OUT_FONT


def test_no_value_is_printed_in_two_splits(layouts):
    printed = {
        split: {
            word for document in documents for line in document.lines for word in line.split() if not _is_label(word)
        }
        for split, documents in layouts.items()
    }
    for split, values in printed.items():
        assert len(values) > 1000
        assert {split_of(value) for value in values} == {split}
        answers = {answer for document in layouts[split] for answer in document.answers}
        assert answers <= values


def test_punctuation_does_not_change_the_split_of_a_value():
    assert split_of("$48.20") == split_of("48.20") == split_of("48.20%") == split_of("#4820")
    shares = np.array([sum(split_of(str(i)) == split for i in range(20_000)) for split in SPLITS]) / 20_000
    np.testing.assert_allclose(shares, (0.80, 0.08, 0.12), atol=0.01)


def test_labels_are_few_and_shared(layouts):
    labels = {
        split: {
            word.rstrip(":") for document in documents for word in document.transcription.split() if _is_label(word)
        }
        for split, documents in layouts.items()
    }
    assert labels["train"] >= labels["heldout"] and labels["train"] >= labels["validation"]
    assert len(labels["train"]) < 80


def test_questions_have_one_answer_and_it_is_on_the_page(layouts):
    for document in layouts["train"] + layouts["heldout"]:
        words = document.transcription.split()
        assert 3 <= len(document.questions) <= 4
        assert len(set(document.questions)) == len(document.questions) == len(document.answers)
        assert all(words.count(answer) == 1 for answer in document.answers)
        assert all(len(question.split()) <= 8 for question in document.questions)
        for question in document.questions:
            for word in question.rstrip("?").split():
                if word.isupper():  # the question names a key
                    assert words.count(word) == 1, (question, document.lines)


def test_answers_are_too_long_to_guess(layouts):
    lengths = [len(answer) for document in layouts["heldout"] for answer in document.answers]
    assert np.mean(lengths) >= 4.5 and min(lengths) >= 3


def test_glyphs_spell_the_transcription(layouts):
    for document in layouts["validation"]:
        assert "".join(glyph.char for glyph in document.glyphs) == "".join(document.transcription.split())
        assert document.transcription == "\n".join(document.lines)
        assert {glyph.char for glyph in document.glyphs} <= set(CHARACTERS)


def test_everything_printed_is_on_the_page(pages):
    for document in pages:
        width, height = document.image.size
        assert 68 <= width <= 80 and 96 <= height <= 160
        for glyph in document.glyphs:
            assert 0 <= glyph.left < glyph.right <= width and 0 <= glyph.top < glyph.bottom <= height


def test_glyph_boxes_contain_ink(pages):
    for document in pages:
        gray = np.asarray(document.image.convert("L"), float)
        paper = np.percentile(gray, 75)
        ink = [
            paper - gray[round(g.top) : round(g.bottom) + 1, round(g.left) : round(g.right) + 1].min()
            for g in document.glyphs
        ]
        assert min(ink) > 40, document.id
        # No nearby position is better: boxes moved by half a line are on the paper between the lines.
        darkness = _mean_darkness(document, gray, 0, 0)
        assert darkness > _mean_darkness(document, gray, 0, -5) and darkness > _mean_darkness(document, gray, 0, 5)


def test_boxes_rotate_with_the_page(pages):
    """The heights of the first and the last character of a line differ by the angle."""
    tilts = []
    for document in pages:
        if document.family == "chart":
            continue
        start = 0
        for line in document.lines:
            count = len(line.replace(" ", ""))
            first, last = document.glyphs[start], document.glyphs[start + count - 1]
            start += count
            if count > 6:
                tilts.append((last.top - first.top) / (last.left - first.left))
    assert np.abs(tilts).max() < np.tan(np.radians(2)) + 1e-3
    assert np.abs(tilts).mean() > 0.008


def test_boxes_do_not_overlap(layouts):
    for document in layouts["validation"][:300]:
        boxes = np.array([glyph[1:] for glyph in document.glyphs])
        left, top, right, bottom = boxes[:, None].transpose(2, 0, 1)
        across = np.minimum(right, right.T) - np.maximum(left, left.T)
        down = np.minimum(bottom, bottom.T) - np.maximum(top, top.T)
        overlaps = (across > 1.0) & (down > 1.0) & ~np.eye(len(boxes), dtype=bool)
        assert not overlaps.any(), (document.id, document.lines)


def test_cut_between_tiles_rarely_crosses_text(pages):
    cut = [
        any(glyph.top + 1.5 < document.image.height / 2 < glyph.bottom - 1.5 for glyph in document.glyphs)
        for document in pages
    ]
    assert np.mean(cut) < 0.2


@pytest.mark.parametrize("font", (*TRAINING_FONTS, HELD_OUT_FONT))
def test_a_character_takes_about_a_patch(font):
    low, high = advance_range(font)
    for advance in (low, high):
        face = get_face(font, advance)
        assert abs(face.digit - advance) < 0.06 and 6.2 <= face.digit <= 7.6
        assert all(face.pitches[digit] == pytest.approx(face.digit, abs=0.05) for digit in "0123456789")
        assert min(face.pitches.values()) >= 0.9 * face.digit - 1e-9
        assert face.space >= face.digit and face.cap_height >= 6.5


def test_records_hold_the_page_as_png():
    [record] = draw_records(0, "train", 5, 6)
    assert np.array_equal(Image.open(io.BytesIO(record["image"])), draw_document(0, "train", 5).image)
    assert set(record) == {"image", "id", "source", "font", "transcription", "questions", "answers"}


def test_errors_name_the_valid_values():
    with pytest.raises(UserError, match="train, validation, heldout"):
        draw_document(0, "test", 0)
    with pytest.raises(UserError, match="receipt, form, table, chart"):
        draw_document(0, "train", 0, family="letter")
    with pytest.raises(UserError, match="DejaVuSans"):
        draw_document(0, "train", 0, font="Comic")


def _is_label(word):
    """Returns whether a word is a label: labels are in title case, values in capitals and digits."""
    return word.rstrip(":").isalpha() and not word.isupper()


def _mean_darkness(document, gray, dx, dy):
    height, width = gray.shape
    x = [min(max(round((g.left + g.right) / 2 + dx), 0), width - 1) for g in document.glyphs]
    y = [min(max(round((g.top + g.bottom) / 2 + dy), 0), height - 1) for g in document.glyphs]
    rows = np.clip(np.array(y)[:, None] + np.arange(-2, 3), 0, height - 1)
    columns = np.clip(np.array(x)[:, None] + np.arange(-2, 3), 0, width - 1)
    return -gray[rows[:, :, None], columns[:, None, :]].mean()
