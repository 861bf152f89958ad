"""A pruned model in PyTorch: the same logits and answers as in JAX, and exact word ids and statistics in any dtype."""

import jax
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.inference.generate import Generator, pad_prompts
from alignvlm_jax.inference.vocabulary import prune_vocabulary
from alignvlm_jax.interop.import_pytorch import read_alignvlm
from alignvlm_jax.models.alignvlm import AlignVLM
from tests.interop.pytorch import folders
from tests.interop.pytorch.conftest import Pair
from tests.interop.pytorch.folders import ask, random_image, relative_error

KEPT = 45  # words, of 330
TOLERANCE = 1e-4
NEVER = 351  # an end token that occurs in none of the answers
ONE = ask("What is the total?", random_image(0, 30, 50))
SEVERAL = ask("Date:", random_image(1, 20, 10), random_image(2, 35, 20))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Pair:
    """A pair of models whose ALIGN keeps `KEPT` words, chosen at random."""
    full = folders.make_config("align")
    usage = np.random.default_rng(1).random(full.connector.vocab_size)
    config, params = prune_vocabulary(full, folders.make_params(full), usage, KEPT)
    folder = folders.write_folder(tmp_path_factory.mktemp("pruned") / "folder", config, params)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    chat = ChatTokenizer.from_folder(folder.parent / f"{folder.name}_chat")
    return Pair(config, params, folder, model.eval(), processor, chat)


def test_logits_match_jax_with_and_without_gradients(pruned):
    assert pruned.model.model.connector.w2.weight.shape == (KEPT, 32)
    model = AlignVLM(pruned.config)
    score = jax.jit(lambda params, batch: model.apply({"params": params}, batch).logits)
    for messages in (ONE, SEVERAL):
        (prompt,) = pruned.prompts(messages)
        batch = pad_prompts([prompt], rows=1, tile_size=20, pad_id=pruned.chat.pad_id)
        expected = np.asarray(score(pruned.params, batch))[:, : len(prompt.tokens)]
        inputs = pruned.inputs(messages)
        # Without gradients ALIGN streams over the words; with them it is checkpointed.
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert relative_error(pruned.model(**inputs).logits, expected) < TOLERANCE


def test_answers_match_jax(pruned):
    generator = Generator(pruned.config, pruned.params, end_ids=[NEVER], pad_id=pruned.chat.pad_id)
    expected = generator.generate(pruned.prompts(ONE, SEVERAL), 24)
    inputs = pruned.inputs(ONE, SEVERAL)
    generated = pruned.model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=NEVER)
    np.testing.assert_array_equal(generated[:, inputs["input_ids"].shape[1] :], np.stack(expected))
    assert all(len(set(answer.tolist())) > 2 for answer in expected)


def test_the_distribution_is_over_the_kept_words(pruned):
    with torch.no_grad():
        features = pruned.model.model.vision_tower(pruned.inputs(ONE)["pixel_values"]).last_hidden_state
        p = pruned.model.model.connector.distribution(features).numpy()

    @jax.jit
    def distribution(params, features):
        def log_distribution(model):
            return model.connector.log_distribution(features, model.language.embedding)

        return AlignVLM(pruned.config).apply({"params": params}, method=log_distribution)

    expected = np.exp(distribution(pruned.params, features.numpy()))
    assert p.shape[-1] == KEPT
    np.testing.assert_allclose(p, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_word_ids_and_statistics_stay_exact_in_narrow_dtypes(pruned, dtype):
    model = transformers.AutoModelForImageTextToText.from_pretrained(pruned.folder, trust_remote_code=True, dtype=dtype)
    connector = model.model.connector
    assert connector.w2.weight.dtype == dtype
    expected = pruned.params["connector"]
    for buffer, name in (
        (connector.word_ids, "word_ids"),
        (connector.key_statistics.mean, "key_mean"),
        (connector.key_statistics.covariance, "key_covariance"),
    ):
        assert str(buffer.dtype) == f"torch.{expected[name].dtype}"
        np.testing.assert_array_equal(buffer.numpy(), expected[name])


def test_a_folder_saved_by_transformers_is_imported_unchanged(pruned, tmp_path):
    pruned.model.save_pretrained(tmp_path / "again")
    pruned.processor.save_pretrained(tmp_path / "again")
    imported = read_alignvlm(tmp_path / "again")
    assert imported.config.model.connector == pruned.config.connector
    weights, expected = flatten_dict(imported.params), flatten_dict(pruned.params)
    assert weights.keys() == expected.keys()
    for path, leaf in expected.items():
        assert weights[path].dtype == leaf.dtype
        np.testing.assert_array_equal(weights[path], leaf)


def test_a_model_from_a_config_has_valid_word_ids(pruned):
    model = transformers.AutoModelForImageTextToText.from_config(pruned.model.config, trust_remote_code=True)
    assert model.model.connector.word_ids.tolist() == list(range(KEPT))
