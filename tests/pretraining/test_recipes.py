"""The recipes write folders that transformers loads, resume after an interruption, and use no held-out page."""

import dataclasses

import numpy as np
import pytest
import transformers

from alignvlm_jax.backbones import backbone_folder
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.synthetic import FAMILIES, HELD_OUT_FONT, draw_document
from alignvlm_jax.data.tiling import plan_tiles
from alignvlm_jax.errors import UserError
from alignvlm_jax.pretraining import language_recipe, vision_recipe
from alignvlm_jax.pretraining.patches import CHARACTERS, patch_classes, reading_order
from alignvlm_jax.pretraining.training import PretrainConfig

TINY = PretrainConfig(steps=2, batch_size=2, save_every=1, warmup_steps=0, validation_pages=2)


@pytest.mark.parametrize("objective", vision_recipe.OBJECTIVES)
def test_the_vision_recipe_writes_an_encoder_for_transformers(tmp_path, objective):
    scores = vision_recipe.make_vision_backbone(tmp_path / "out", tmp_path / "work", TINY, objective)
    assert all(np.isfinite(value) for value in scores.values())
    model = transformers.SiglipVisionModel.from_pretrained(tmp_path / "out")
    assert model.config.patch_size == vision_recipe.NANO_VISION.patch_size


def test_the_language_recipe_writes_a_decoder_and_resumes(tmp_path):
    language_recipe.make_language_backbone(tmp_path / "first", tmp_path / "work", TINY)
    longer = dataclasses.replace(TINY, steps=3)
    language_recipe.make_language_backbone(tmp_path / "second", tmp_path / "work", longer)
    assert {path.name for path in (tmp_path / "work" / "checkpoints").iterdir()} >= {"2", "3"}  # not 1
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "second")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "second")
    ours = ChatTokenizer.from_folder(tmp_path / "second")
    text = "What is the total of TORVAL?\n48.20%"
    assert tokenizer(text, add_special_tokens=False).input_ids == list(ours.encode_text(text))


def test_values_are_spelled_with_one_token_per_character():
    chat = ChatTokenizer.from_folder(backbone_folder("language", "nano"))
    for value in ("TORVAL", "14/03/21", "$128.40", "RQ-5821", "48.2%"):
        assert [chat.decode([token]) for token in chat.encode_text(value)] == list(value)
    assert all(len(chat.encode_text(character)) == 1 for character in CHARACTERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_patch_labels_spell_the_page(family):
    """Nearly every printed character has a patch of its own, and no patch has another character."""
    num_printed = num_labeled = 0
    for index in range(50):
        document = draw_document(3, "train", index, family=family, render=False)
        plan = plan_tiles(*document.size, vision_recipe.NANO_TILING)
        classes = patch_classes(document, plan, 80, 8)
        assert classes.shape == (vision_recipe.TILES_PER_PAGE, 100)
        characters = [CHARACTERS[c - 1] for c in reading_order(classes)]
        num_labeled += len(characters)
        num_printed += len(document.glyphs)
        assert not set(characters) - {glyph.char for glyph in document.glyphs}
    assert num_labeled > 0.99 * num_printed


def test_the_recipes_see_neither_held_out_values_nor_the_held_out_font():
    """They draw from the train split; tests/data/test_synthetic.py shows that the splits are disjoint."""
    assert draw_document(TINY.seed, "train", 0).font != HELD_OUT_FONT
    batch_tiles = vision_recipe.make_batches(TINY)[0]["tiles"]
    document = draw_document(TINY.seed, "train", 0)
    tiles, _ = vision_recipe.cut_tiles(
        document.image, plan_tiles(*document.size, vision_recipe.NANO_TILING), vision_recipe.NANO_TILING.tile_size
    )
    np.testing.assert_array_equal(batch_tiles[0], tiles)


def test_the_decoder_is_trained_on_the_text_of_the_page():
    chat = ChatTokenizer.from_folder(backbone_folder("language", "nano"))
    batch = language_recipe.make_batches(dataclasses.replace(TINY, batch_size=8), chat)[0]
    text = chat.decode(batch["tokens"][0][batch["segment_ids"][0] > 0])
    document = draw_document(TINY.seed, "train", 0, render=False)
    has_weight = batch["loss_weights"][0] > 0
    answers = chat.decode(batch["targets"][0][has_weight])
    assert all(answer in text for answer in document.answers) or document.transcription in text
    assert answers and all(piece in document.transcription for piece in answers.split("\n")[1:-1])
    assert np.all(batch["mixed"] <= 0.4) and np.all(batch["mixed"][batch["loss_weights"] > 0] == 0)


def test_transcription_labels_do_not_depend_on_positions():
    """Moving all characters to other patches, in the same order, does not change the labels of CTC."""
    classes = np.zeros((1, 2, 100), np.int32)
    classes[0, 0, [3, 5, 9]] = 7, 8, 9
    moved = np.zeros_like(classes)
    moved[0, 1, [1, 50, 99]] = 7, 8, 9
    np.testing.assert_array_equal(reading_order(classes[0]), reading_order(moved[0]))


def test_a_folder_that_is_not_a_backbone_is_refused(tmp_path):
    with pytest.raises(UserError, match="needs a Hugging Face config.json"):
        backbone_folder("vision", str(tmp_path))


def test_best_path_decoding_and_the_character_error_rate():
    a, b, c = (CHARACTERS.index(character) + 1 for character in "ABC")
    classes = np.array(
        [[[0, a, a, 0, a], [b, b, c, 0, 0]], [[0, 0, 0, 0, 0], [c, 0, 0, 0, 0]]]
    )  # two pages of two tiles
    logits = np.eye(len(CHARACTERS) + 1)[classes]
    assert vision_recipe.best_path(logits) == ["AABC", "C"]
    printed = np.array([[a, b, c, 0, 0], [c, b, 0, 0, 0]])
    assert vision_recipe.character_error_rate(["AABC", "C"], {"characters": printed}) == 2 / 5


def test_the_two_shipped_encoders_differ_in_weights_but_not_in_shapes():
    shipped = [backbone_folder("vision", name) for name in ("nano", "nano-transcription")]
    nano, transcription = (transformers.SiglipVisionModel.from_pretrained(folder).state_dict() for folder in shipped)
    assert {key: leaf.shape for key, leaf in nano.items()} == {key: leaf.shape for key, leaf in transcription.items()}
    assert not any(np.array_equal(nano[key].float(), transcription[key].float()) for key in nano if nano[key].ndim > 1)
