"""The inspector of a small model shows what the model computes: P, the answer, and the answer's attribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax import cli
from alignvlm_jax.data import images
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.vocabulary import prune_vocabulary
from alignvlm_jax.inspector import InspectConfig, inspect_image, packing
from alignvlm_jax.inspector.attribution import attribute
from alignvlm_jax.inspector.words import patch_words
from alignvlm_jax.models.alignvlm import AlignVLM
from alignvlm_jax.models.connectors import MLPConfig
from tests.inspector.samples import QUESTION, noise_page, tiny_reader
from tests.inspector.test_packing import unpack

CONFIG = InspectConfig(words_per_patch=20, steps=64, max_new_tokens=3)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return tiny_reader(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def inspection(reader):
    return inspect_image(reader, noise_page(0), [QUESTION], name="page", config=CONFIG, progress=False)


def dense_distribution(reader, tiles, valid_hw) -> np.ndarray:
    """Returns the complete distribution P of every patch."""

    def distribution(model):
        features = model.encode_features(tiles[None], valid_hw[None])
        return jnp.exp(model.connector.log_distribution(features, model.language.embedding))

    return np.asarray(AlignVLM(reader.config).apply(reader.generator.variables, method=distribution), np.float64)


def test_the_page_data_contain_the_distribution_of_each_patch(reader, inspection):
    prompt = reader.prompts(noise_page(0), [QUESTION])[0]
    p = dense_distribution(reader, prompt.tiles, prompt.tile_valid_hw).reshape(-1, reader.config.language.vocab_size)
    text = inspection.to_json()["text"]
    patches = unpack(text)
    assert len(patches) == len(p) == 2 * 4
    ids = dict(zip(text["words"], packing.decode(text["ids"], "<u4"), strict=True))
    assert all(reader.tokenizer.token_text(int(token)) == word for word, token in ids.items())
    for pairs, dense in zip(patches, p, strict=True):
        order = np.argsort(-dense)[:20]
        order = order[dense[order] >= packing.FLOOR]
        np.testing.assert_array_equal([ids[word] for word, _ in pairs], order)
        np.testing.assert_allclose([share for _, share in pairs], dense[order], rtol=5e-4)
    entropy = -np.sum(p * np.log(np.maximum(p, 1e-30)), axis=-1)
    limit = np.log(text["vocabulary"])
    np.testing.assert_allclose(packing.decode(text["entropy"], "<u2") / 65535 * limit, entropy, atol=1e-3)
    assert np.ptp(entropy) > 0.1


def test_the_answer_is_the_same_as_the_readers(reader, inspection):
    (answer,) = inspection.answers
    assert answer.text == reader.ask(noise_page(0), QUESTION, max_new_tokens=3)
    question = inspection.to_json()["questions"][0]
    assert (question["question"], question["answer"]) == (QUESTION, answer.text)
    texts = [reader.tokenizer.token_text(int(token)) for token in answer.ids]
    assert [token["text"] for token in question["tokens"]] == texts and len(texts) == 3


def test_shares_add_up_to_the_rise_in_log_probability(inspection):
    (answer,) = inspection.answers
    rise = answer.attribution.log_probs - answer.attribution.blank_log_probs
    assert np.max(np.abs(rise)) > 0.1
    np.testing.assert_allclose(answer.attribution.shares.sum(axis=1), rise, atol=0.02 * np.max(np.abs(rise)))
    assert answer.attribution.missing < 0.02
    question = inspection.to_json()["questions"][0]
    maps = packing.decode(question["maps"]["values"], "<i2").reshape(4, -1) / 32767
    maps *= np.array(question["maps"]["scales"])[:, None]
    shares = answer.attribution.shares
    for packed, exact in ((maps[0], shares.sum(axis=0)), (maps[1:], shares)):
        np.testing.assert_allclose(packed, exact, atol=np.max(np.abs(exact)) / 60000)


def test_log_probabilities_match_the_complete_model(reader, inspection):
    """The reference is the forward pass of training, with the tiles in the batch."""
    (answer,) = inspection.answers
    prompt = reader.prompts(noise_page(0), [QUESTION])[0]
    tokens = np.concatenate([prompt.tokens, answer.ids])[None]
    batch = {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "positions": np.arange(tokens.shape[1])[None],
        "visual_index": np.concatenate([prompt.visual_index, np.full(len(answer.ids), -1)])[None],
        "tiles": prompt.tiles[None],
        "tile_valid_hw": prompt.tile_valid_hw[None],
    }
    logits = AlignVLM(reader.config).apply(reader.generator.variables, batch).logits[0, -1 - len(answer.ids) : -1]
    expected = jax.nn.log_softmax(logits)[np.arange(len(answer.ids)), answer.ids]
    np.testing.assert_allclose(answer.attribution.log_probs, expected, rtol=1e-4, atol=1e-4)


def test_shares_of_joined_tiles_reach_their_patches(tmp_path):
    """Under anyres_max_9, gradients pass through the resampling, and patches of the border get no share."""
    reader = tiny_reader(tmp_path, "anyres_max_9")
    page = noise_page(0, 64, 12)  # 1 x 2 cells, with a border above and below.
    inspection = inspect_image(reader, page, [QUESTION], config=CONFIG, progress=False)
    shares = inspection.answers[0].attribution.shares.reshape(3, len(inspection.tiles), -1)
    unused = inspection.unused_patches
    assert unused.any() and not unused[0].any()
    assert np.all(shares[:, unused] == 0) and np.all(np.any(shares[:, ~unused] != 0, axis=0))
    assert inspection.answers[0].attribution.missing < 0.05
    data = inspection.to_json()
    assert [layer["name"] for layer in data["layers"]] == ["tiles", "thumbnail"]
    np.testing.assert_array_equal(packing.decode(data["leftOut"], "u1"), unused.reshape(-1))


def test_shares_of_the_answer_are_the_sums_over_its_tokens(reader, inspection):
    prompt = reader.prompts(noise_page(0), [QUESTION])[0]
    (answer,) = inspection.answers
    variables, tiles = reader.generator.variables, prompt.tiles
    visual = patch_words(reader.config, variables, tiles, prompt.tile_valid_hw, k=20, progress=False).visual
    blank = np.zeros_like(visual).reshape(-1, visual.shape[-1])
    together, per_token_shares = (
        attribute(
            *(reader.config, variables, prompt, answer.ids, visual.reshape(blank.shape), blank),
            steps=2,
            per_token=per_token,
            progress=False,
        )
        for per_token in (False, True)
    )
    assert together.shares.shape == (1, 8)
    np.testing.assert_allclose(together.shares[0], per_token_shares.shares.sum(axis=0), rtol=1e-3, atol=1e-5)


def test_words_of_a_pruned_vocabulary_have_the_ids_of_the_full_one(reader):
    prompt = reader.prompts(noise_page(0), [QUESTION])[0]
    full = dense_distribution(reader, prompt.tiles, prompt.tile_valid_hw)
    usage = full.sum(axis=(0, 1))
    config, params = prune_vocabulary(reader.config, reader.generator.variables["params"], usage, 50)
    pruned = patch_words(config, {"params": params}, prompt.tiles, prompt.tile_valid_hw, k=5, progress=False)
    kept = np.where(usage >= np.sort(usage)[-50], full, 0)
    np.testing.assert_array_equal(pruned.ids[..., 0], np.argmax(kept, axis=-1))


def test_invalid_requests_are_refused(reader, tmp_path):
    with pytest.raises(UserError, match="mlp.*no words"):
        mlp = dataclasses.replace(reader.config, connector=MLPConfig())
        patch_words(mlp, {}, np.zeros((1, 16, 16, 3), np.uint8), np.full((1, 2), 16), k=1)
    with pytest.raises(UserError, match="1 to 1000"):
        InspectConfig(words_per_patch=1001)
    with pytest.raises(UserError, match="question is empty"):
        inspect_image(reader, noise_page(0), [" "], config=CONFIG, progress=False)


def test_the_command_writes_the_page(tmp_path, capsys, monkeypatch, reader):
    monkeypatch.setattr("alignvlm_jax.inspector.inspection.load", lambda checkpoint: reader)
    images.to_rgb(noise_page(0)).save(tmp_path / "scan.png")
    out = tmp_path / "page.html"
    command = ["inspect", "--checkpoint", "mine", str(tmp_path / "scan.png"), "--out", str(out)]
    assert cli.main([*command, "--question", QUESTION, "--attribution", "none", "--max-new-tokens", "3"]) == 0
    printed = capsys.readouterr().out
    assert QUESTION in printed and "2 tiles, 8 patches" in printed
    assert "scan.png" in out.read_text() and '"maps":null' in out.read_text()
    assert cli.main(["inspect", "--checkpoint", "mine", "nowhere.png", "--out", str(out)]) == 2
    assert "no such image" in capsys.readouterr().err
