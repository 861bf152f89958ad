"""Tests of the reader: kinds of image sources, single and batched questions, several images, and refusals."""

import base64
import copy
import dataclasses
import io

import jax
import numpy as np
import PIL.Image
import pytest

from alignvlm_jax.checkpoints.weights import write_checkpoint
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import views
from alignvlm_jax.inference.chat_prompts import conversation_prompt
from alignvlm_jax.inference.reader import Reader, load
from alignvlm_jax.models import hardware
from alignvlm_jax.models.alignvlm import AlignVLMConfig, random_parameters
from alignvlm_jax.models.connectors import AlignConfig
from tests.data import pdf_files
from tests.data.nano_tokenizer import write_chat_folder
from tests.tiny_models import tiny_language, tiny_vision
from tests.training.batches import stage

QUESTION = "What is the total?"
MAX_NEW = 6


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Reader:
    tokenizer = ChatTokenizer.from_folder(write_chat_folder(tmp_path_factory.mktemp("tokenizer")))
    config = AlignVLMConfig(
        vision=tiny_vision(),
        connector=AlignConfig(vocab_scale_init=8.0),
        language=tiny_language(tokenizer.vocab_size, num_layers=1, max_position_embeddings=128),
    )
    params = jax.jit(lambda rng: jax.tree.map(lambda leaf: leaf * 4, random_parameters(config, rng)))(jax.random.key(0))
    tiling = TilingConfig(tile_size=16, max_tiles=4, thumbnail=False)
    return Reader(config, params, tokenizer, tiling, batch_size=4)


def page(seed: int, width: int = 16, height: int = 30) -> PIL.Image.Image:
    """Returns an image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return PIL.Image.fromarray(pixels)


def test_path_bytes_and_image_give_the_same_answer(reader, tmp_path):
    image, encoded = page(0), io.BytesIO()
    image.save(encoded, "PNG")
    image.save(tmp_path / "page.png")
    sources = [image, image.convert("RGBA"), encoded.getvalue(), tmp_path / "page.png", str(tmp_path / "page.png")]
    answers = {reader.ask(source, QUESTION, max_new_tokens=MAX_NEW) for source in sources}
    assert len(answers) == 1 and isinstance(answers.pop(), str)


def test_a_pdf_is_read_page_by_page(reader, tmp_path):
    two = tmp_path / "two.pdf"
    two.write_bytes(pdf_files.of_images(page(0, 16, 16), page(1, 16, 16)))
    pages = [f"{two}#page=1", f"{two}#page=2"]
    prompt, *singles = (reader.prompts(source, [QUESTION])[0] for source in (two, *pages))
    # Each page fills the four tiles that an image may have.
    assert len(prompt.tiles) == 8 and (prompt.tiles[4:] == singles[1].tiles).all()
    for other in (reader.prompts(pages, [QUESTION])[0], reader.prompts_of_pairs([two], [QUESTION])[0]):
        assert (other.tokens == prompt.tokens).all() and (other.tiles == prompt.tiles).all()
    assert isinstance(reader.ask(two, QUESTION, max_new_tokens=1), str)
    # A page is rendered with many pixels, but is no larger than on paper.
    assert prompt.page_scale == 1.0


def test_chat_answers_the_last_message(reader, tmp_path):
    first, second = page(0, 16, 16), page(1, 16, 16)
    (tmp_path / "two.pdf").write_bytes(pdf_files.of_images(first, second))
    encoded = io.BytesIO()
    first.save(encoded, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"
    question = {"type": "text", "text": QUESTION}
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, question]}]
    answer = reader.chat(messages, max_new_tokens=1)
    assert answer == reader.ask(first, QUESTION, max_new_tokens=1)

    turns = [*messages, {"role": "assistant", "content": "12.50"}]
    parts = [{"type": "image"}, question, {"type": "image", "image": second}]
    prompt = conversation_prompt(reader, [*turns, {"role": "user", "content": parts}], [tmp_path / "two.pdf"])
    expected = [{"role": "user", "content": [{"type": "image"}, question]}, turns[1]]
    expected.append({"role": "user", "content": [{"type": "image"}, {"type": "image"}, question, {"type": "image"}]})
    cut_images = [reader.cut(first), *reader.cut_all(tmp_path / "two.pdf"), reader.cut(second)]
    assert (prompt.tokens == reader.chat_prompt(expected, cut_images).tokens).all()
    assert (prompt.tiles == np.concatenate([cut.tiles for cut in cut_images])).all()
    with pytest.raises(UserError, match="a link, not a file"):
        reader.chat([{"role": "user", "content": [{"type": "image", "url": "https://example.org/a.png"}]}])


def test_batched_answers_equal_single_ones(reader):
    images = [page(1), page(2, 16, 16), page(3)]
    questions = [QUESTION, "Read the page.", "Date?"]
    one_by_one = [
        reader.ask(image, question, max_new_tokens=MAX_NEW) for image, question in zip(images, questions, strict=True)
    ]
    assert reader.ask_batch(images, questions, max_new_tokens=MAX_NEW) == one_by_one


def test_many_questions_about_one_page(reader):
    questions = [QUESTION, "Read the page.", "Date?", "Name?", "Due?"]
    many = reader.ask_many(page(1), questions, max_new_tokens=MAX_NEW)
    assert many == [reader.ask(page(1), question, max_new_tokens=MAX_NEW) for question in questions]
    assert reader.ask_many(page(1), [], max_new_tokens=MAX_NEW) == []

    pages = [page(1, 16, 16), page(2, 16, 16)]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": QUESTION}]
    both = reader.chat_prompt([{"role": "user", "content": content}], [reader.cut(image) for image in pages])
    expected = reader.answer([both], max_new_tokens=MAX_NEW)
    assert reader.ask_many(pages, [QUESTION, "Date?"], max_new_tokens=MAX_NEW)[:1] == expected


def test_an_image_that_occurs_several_times_is_cut_once(reader, tmp_path, monkeypatch):
    first, second, encoded = page(1), page(2), io.BytesIO()
    first.save(encoded, "PNG")
    second.save(tmp_path / "page.png")
    copies = [encoded.getvalue(), bytes(bytearray(encoded.getvalue()))]
    images = [first, str(tmp_path / "page.png"), copies[0], first, tmp_path / "page.png", copies[1]]
    cut, num_cut = type(reader).cut, []
    monkeypatch.setattr(type(reader), "cut", lambda self, image: num_cut.append(image) or cut(self, image))
    answers = reader.ask_batch(images, [QUESTION, QUESTION, "Date?"] * 2, max_new_tokens=MAX_NEW)
    assert len(num_cut) == 3
    assert answers[:3] == answers[3:]


def test_a_prompt_has_the_tiles_and_visual_tokens_of_its_image(reader):
    first, second = reader.prompts(page(0), [QUESTION, "Date?"])
    assert first.tiles.shape == (2, 16, 16, 3)
    assert first.tiles is second.tiles, "tiles are cut once"
    visual = first.visual_index[first.visual_index >= 0]
    np.testing.assert_array_equal(visual, np.arange(8))
    assert (first.tokens[first.visual_index >= 0] == reader.tokenizer.image_id).all()
    assert QUESTION in reader.tokenizer.decode(first.tokens)


def test_spaces_around_a_question_do_not_matter(reader):
    first, second = reader.prompts(page(0), [QUESTION, f"  {QUESTION}\n"])
    np.testing.assert_array_equal(first.tokens, second.tokens)


def test_invalid_questions_and_images_are_refused(reader):
    with pytest.raises(UserError, match="empty"):
        reader.ask(page(0), " ")
    with pytest.raises(UserError, match="Shorten the question"):
        reader.ask(page(0), "total " * 200)
    with pytest.raises(UserError, match="expected one image per question, got 1 images and 2 questions"):
        reader.ask_batch([page(0)], [QUESTION, QUESTION])
    with pytest.raises(UserError, match="no such image"):
        reader.ask("nowhere.png", QUESTION)


def test_weights_stay_bfloat16_if_stored_and_used_in_it(reader, tmp_path):
    for part in ("vision", "language"):
        assert hardware.resolve(getattr(reader.config, part)).dtype == "float32"
    model = dataclasses.replace(
        reader.config,
        vision=dataclasses.replace(reader.config.vision, dtype="bfloat16"),
        language=dataclasses.replace(reader.config.language, dtype="bfloat16"),
    )
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), reader.generator.variables["params"])
    for name, shape in (("wide", reader.config), ("narrow", model)):
        data = DataConfig(tiling=reader.tiling)
        config = ExperimentConfig(model=shape, data=data, stages=(stage(name="only", steps=4),))
        write_checkpoint(tmp_path / name, config, params, reader.tokenizer, history=[])
    for name, options, dtype in (
        ("wide", {}, "float32"),
        ("narrow", {}, "bfloat16"),
        ("narrow", {"dtype": "float32"}, "float32"),
    ):
        loaded = load(tmp_path / name, **options)
        weights = jax.tree.leaves(loaded.generator.variables["params"])
        assert {str(leaf.dtype) for leaf in weights} == {dtype}
        assert isinstance(loaded.ask(page(0), QUESTION, max_new_tokens=2), str)


def test_pages_with_joined_tiles(reader):
    """Pages of several sizes have no tokens beyond their edges, and the same answers in a batch as alone."""
    config = dataclasses.replace(reader.config, newline=True)
    params = jax.jit(lambda rng: jax.tree.map(lambda leaf: leaf * 4, random_parameters(config, rng)))(jax.random.key(0))
    tiling = TilingConfig("anyres_max_9", tile_size=16, max_tiles=2, grid_side=3)
    joined = Reader(config, params, reader.tokenizer, tiling, batch_size=4)
    pages = [page(0), page(1, 48, 48), page(2, 40, 17)]
    # Four tokens per tile, and four for the whole page first. 2 x 1 cells are 4 rows of 2 tokens. 3 x 3 cells have 36
    # tokens where 8 fit, and are shrunk by 2.12 to 2 rows of 2. 40 x 17 pixels cover 2 of the 4 rows of 2 x 3 cells,
    # and are shrunk by 1.22 to 1 row of 4.
    counts = [int((prompt.visual_index >= 0).sum()) for p in pages for prompt in joined.prompts(p, [QUESTION])]
    assert counts == [4 + 4 * 3, 4 + 2 * 3, 4 + 1 * 5]
    together = joined.ask_batch(pages, [QUESTION] * 3, max_new_tokens=MAX_NEW)
    assert together == [joined.ask(p, QUESTION, max_new_tokens=MAX_NEW) for p in pages]
    assert len(set(together)) == 3


def test_several_images_in_one_prompt(reader):
    cut_images = [reader.cut(page(0)), reader.cut(page(1, 16, 16))]
    parts = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " like "}, {"type": "image"}]
    messages = [{"role": "user", "content": parts}]
    both = reader.chat_prompt(messages, cut_images)
    np.testing.assert_array_equal(both.tiles, np.concatenate([cut_images[0].tiles, cut_images[1].tiles]))
    assert both.tiles.shape[0] == len(both.tile_valid_hw) == 3
    np.testing.assert_array_equal(both.visual_index[both.visual_index >= 0], np.arange(3 * 4))
    runs = np.flatnonzero(np.diff(both.visual_index >= 0))
    assert len(runs) == 4, "text, image, text, image, text"

    swapped = reader.chat_prompt(messages, cut_images[::-1])
    alone = [reader.answer([prompt], max_new_tokens=MAX_NEW)[0] for prompt in (both, swapped)]
    one = reader.prompts(page(2), [QUESTION])[0]
    assert reader.answer([both, one, swapped], max_new_tokens=MAX_NEW)[::2] == alone

    anyres = copy.copy(reader)
    anyres.tiling = TilingConfig(tile_size=16, max_tiles=4, rule="anyres_max_9", thumbnail=True)
    cut_images = [anyres.cut(page(0)), anyres.cut(page(1, 16, 16))]
    single = [anyres.chat_prompt([{"role": "user", "content": parts[1:2]}], [image]) for image in cut_images]
    both = anyres.chat_prompt(messages, cut_images)
    assert np.sum(both.visual_index >= 0) == sum(len(prompt.resampling.sources) for prompt in single)
    first = len(single[0].resampling.sources)
    second_sources = single[1].resampling.sources
    second_sources = np.where(second_sources >= 0, second_sources + 4 * len(cut_images[0].tiles), -1)
    np.testing.assert_array_equal(both.resampling.sources[first:], second_sources)

    with pytest.raises(UserError, match="2 images and question take"):
        reader.chat_prompt([{"role": "user", "content": [*parts, {"type": "text", "text": "long " * 99}]}], cut_images)


def test_several_views_of_an_image(reader):
    multi_view_reader = reader.with_views(4)
    image = page(0, 32, 60)  # Two pixels of the image per pixel of a tile: a quarter of a patch is 4.
    cut, plain = multi_view_reader.cut(image), reader.cut(image)
    assert plain.other_views is None and cut.plan == plain.plan
    expected = [reader.cut(views.shift(image, x, y)).tiles for y in (-4, 4) for x in (-4, 4)]
    np.testing.assert_array_equal(np.stack([cut.tiles, *cut.other_views]), np.stack(expected))
    np.testing.assert_array_equal(cut.valid_hw, plain.valid_hw)

    images, questions = [image, page(1), page(2, 16, 16)], [QUESTION, "Read the page.", "Date?"]
    one_by_one = [multi_view_reader.ask(*pair, max_new_tokens=MAX_NEW) for pair in zip(images, questions, strict=True)]
    assert multi_view_reader.ask_batch(images, questions, max_new_tokens=MAX_NEW) == one_by_one
    assert one_by_one != reader.ask_batch(images, questions, max_new_tokens=MAX_NEW)

    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": QUESTION}]
    both = multi_view_reader.chat_prompt([{"role": "user", "content": content}], [cut, multi_view_reader.cut(page(1))])
    assert both.num_views == 4 and both.other_views.shape == (3, *both.tiles.shape)
    np.testing.assert_array_equal(both.other_views[:, : len(cut.tiles)], cut.other_views)
    text = multi_view_reader.chat_prompt([{"role": "user", "content": QUESTION}], [])
    assert text.num_views == 1
    with pytest.raises(UserError, match="must be at least 1, got 0"):
        reader.with_views(0)
