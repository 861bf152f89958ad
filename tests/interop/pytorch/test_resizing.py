"""Embedding tables of another size: ALIGN keeps its words, and folders with such a table are loaded and imported."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from alignvlm_jax.inference.vocabulary import prune_vocabulary
from alignvlm_jax.interop.import_pytorch import read_alignvlm
from alignvlm_jax.models.connectors import AlignConfig
from tests.interop.pytorch import folders
from tests.interop.pytorch.folders import ask, random_image

ROWS, KEPT = 352, 45
ONE = ask("What is the total?", random_image(0, 30, 50))


def load(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folders by name; ALIGN ranges over all rows of the table, over 45 of them, or does not exist."""
    root = tmp_path_factory.mktemp("resized")
    for name, connector, tied in (("tied", "align", True), ("untied", "align", False), ("mlp", "mlp", True)):
        config = folders.make_config(connector, tied)
        if connector == "align":
            config = dataclasses.replace(config, connector=AlignConfig())
        folders.write_folder(root / name, config, folders.make_params(config))
    full = folders.make_config()
    usage = np.random.default_rng(1).random(full.connector.vocab_size)
    folders.write_folder(root / "pruned", *prune_vocabulary(full, folders.make_params(full), usage, KEPT))
    return root


@pytest.fixture(scope="module")
def processor(exported):
    return transformers.AutoProcessor.from_pretrained(exported / "tied", trust_remote_code=True)


@pytest.fixture(scope="module")
def inputs(processor):
    return processor.apply_chat_template(ONE, tokenize=True, return_dict=True, return_tensors="pt")


@pytest.mark.parametrize("name", ["tied", "untied", "mlp", "pruned"])
def test_added_tokens_change_no_other_logits(exported, processor, inputs, name, tmp_path):
    """huggingface/transformers#36590, #33819: a part of the model keeps the vocabulary's old size."""
    model = load(exported / name)
    words = model.config.connector_config.get("vocab_size")
    with torch.no_grad():
        expected = model(**inputs).logits
        model.resize_token_embeddings(ROWS + 2, pad_to_multiple_of=16)
        grown = model(**inputs).logits
    assert grown.shape[-1] == model.get_input_embeddings().weight.shape[0] == model.config.text_config.vocab_size == 368
    torch.testing.assert_close(grown[..., :ROWS], expected)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (name != "untied")
    # `null` stood for all rows of the table.
    all_rows = name in ("tied", "untied")
    assert model.config.connector_config.get("vocab_size") == (ROWS if all_rows else words)

    model.save_pretrained(tmp_path / "grown", max_shard_size="100KB")
    processor.save_pretrained(tmp_path / "grown")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "grown")(**inputs).logits, grown)
    imported = read_alignvlm(tmp_path / "grown")
    assert imported.config.model.language.vocab_size == 368
    assert getattr(imported.config.model.connector, "vocab_size", None) == (ROWS if all_rows else words)
    table = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(imported.params["language"]["embedding"], table)


def test_a_table_shrinks_down_to_the_words_of_the_connector(exported, inputs):
    model = load(exported / "tied")
    with torch.no_grad():
        expected = model(**inputs).logits
        for too_few in (ROWS - 1, 8):
            with pytest.raises(
                ValueError, match=f"cannot shrink .* to {too_few} rows: the connector reads {ROWS} rows"
            ):
                model.resize_token_embeddings(too_few)
        model.resize_token_embeddings(ROWS + 100)
        model.resize_token_embeddings(ROWS)
        torch.testing.assert_close(model(**inputs).logits, expected)
        assert model.resize_token_embeddings() is model.get_input_embeddings()


def test_rows_beyond_the_words_can_be_removed(exported, inputs):
    pruned, mlp = load(exported / "pruned"), load(exported / "mlp")
    with pytest.raises(ValueError, match="cannot shrink"):
        pruned.resize_token_embeddings(int(pruned.model.connector.word_ids.max()))
    with pytest.raises(ValueError, match=f"the image token is row {mlp.config.image_token_id}"):
        mlp.resize_token_embeddings(mlp.config.image_token_id)
    with torch.no_grad():
        for model in (pruned, mlp):
            expected = model(**inputs).logits[..., : ROWS - 8]
            model.resize_token_embeddings(ROWS - 8)
            torch.testing.assert_close(model(**inputs).logits, expected)


def test_the_base_model_is_resized_too(exported):
    """Adding tokens to the model without its head, as embedders do."""
    model = transformers.AutoModel.from_pretrained(exported / "tied", trust_remote_code=True)
    model.resize_token_embeddings(ROWS + 1)
    assert model.config.connector_config["vocab_size"] == ROWS
    with pytest.raises(ValueError, match="cannot shrink"):
        model.resize_token_embeddings(ROWS - 1)
