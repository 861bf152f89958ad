"""The exported model against the JAX model: logits, decoding, loss and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import torch
import transformers

from alignvlm_jax.inference.generate import Generator, pad_prompts
from alignvlm_jax.interop.pytorch.image_processing_alignvlm import normalize_tiles
from alignvlm_jax.models.alignvlm import AlignVLM, tokens_per_tile
from tests.interop.pytorch.folders import (
    CONNECTORS,
    ask,
    make_prompt,
    random_image,
    relative_error,
    state_dict,
    tiles_of,
)

TOLERANCE = 1e-4
NEVER = 351  # an end token that occurs in none of the answers below

ONE = ask("What is the total?", random_image(0, 30, 50))  # five tiles
# Images of one, three and one tiles.
SEVERAL = ask("Date:", random_image(1, 20, 10), random_image(2, 35, 20), random_image(3, 7, 9))
TEXT = ask("Read the page. the total of the page")
MIXED = {"one": ONE, "several": SEVERAL, "text": TEXT}

ANSWERED = [
    [*ONE, {"role": "assistant", "content": "12.50"}],
    [*SEVERAL, {"role": "assistant", "content": "2024-03-11"}, *TEXT, {"role": "assistant", "content": "Anna Invoice"}],
    [*TEXT, {"role": "assistant", "content": "the total"}],
]


@pytest.fixture(scope="module")
def trained(pair):
    """A function from a connector to its pair, and to the PyTorch inputs and JAX results of `ANSWERED`.

    It returns (pair, inputs for PyTorch, loss, gradients, logits of each row).
    """

    @functools.cache
    def run(connector):
        models = pair(connector, tied=connector != "mlp")
        prompts, chats = [], []
        for messages in ANSWERED:
            prompt = make_prompt(models.config, models.chat, messages)
            counts = [len(tiles) * tokens_per_tile(models.config) for tiles, _ in tiles_of(messages)]
            chats.append(models.chat.encode(messages, counts))
            prompts.append(dataclasses.replace(prompt, tokens=chats[-1].tokens, visual_index=chats[-1].visual_index))
        batch = pad_prompts(prompts, rows=len(prompts), tile_size=20, pad_id=models.chat.pad_id)
        batch["targets"] = np.zeros_like(batch["tokens"])
        batch["loss_weights"] = np.zeros(batch["tokens"].shape, np.float32)
        for row, chat in enumerate(chats):
            batch["targets"][row, : len(chat.tokens) - 1] = chat.tokens[1:]
            batch["loss_weights"][row, : len(chat.tokens)] = chat.loss_weights

        def loss(params, batch):
            output = AlignVLM(models.config).apply({"params": params}, batch, method="loss")
            return output.loss / output.weight, AlignVLM(models.config).apply({"params": params}, batch).logits

        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, logits), gradients = compiled(*jax.tree.map(jnp.asarray, (models.params, batch)))
        logits = [row[: len(chat.tokens)] for row, chat in zip(np.asarray(logits), chats, strict=True)]
        return (
            models,
            left_padded(models, chats, prompts),
            float(value),
            state_dict(models.config, gradients),
            logits,
        )

    return run


def left_padded(pair, chats, prompts) -> dict[str, torch.Tensor]:
    """Returns inputs and labels, padded on the left as a PyTorch collator does."""
    length = max(len(chat.tokens) for chat in chats)
    input_ids = torch.full((len(chats), length), pair.chat.pad_id)
    labels, mask = torch.full_like(input_ids, -100), torch.zeros_like(input_ids)
    for row, chat in enumerate(chats):
        input_ids[row, -len(chat.tokens) :] = torch.tensor(chat.tokens)
        mask[row, -len(chat.tokens) :] = 1
        row_labels = np.where(chat.loss_weights[:-1] > 0, chat.tokens[1:], -100)
        labels[row, 1 - len(chat.tokens) :] = torch.tensor(row_labels)
    assert (labels != -100).sum() == sum(chat.loss_weights.sum() for chat in chats) > 10
    pixel_values = [normalize_tiles(prompt.tiles, prompt.tile_valid_hw) for prompt in prompts if len(prompt.tiles)]
    pixel_values = torch.tensor(np.concatenate(pixel_values))
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "pixel_values": pixel_values}


@pytest.mark.parametrize("connector", CONNECTORS)
def test_logits_match_jax(trained, connector):
    """The rows have one image, several images in two turns, and text alone. Each is run in a batch and alone."""
    pair, inputs, _, _, expected = trained(connector)
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    tiles = inputs["pixel_values"].split([5, 5])
    with torch.no_grad():
        together = pair.model(**inputs).logits
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            assert relative_error(together[row, mask], expected[row]) < TOLERANCE
            images = {"pixel_values": tiles[row]} if row < 2 else {}
            alone = pair.model(input_ids=inputs["input_ids"][row : row + 1, mask], **images)
            assert relative_error(alone.logits[0], expected[row]) < TOLERANCE


def test_padding_on_the_right_gives_the_same_logits(pair):
    pair = pair()
    left = pair.inputs(TEXT, ONE)
    texts = pair.processor.apply_chat_template([TEXT, ONE], add_generation_prompt=True)
    right = pair.processor(text=texts, images=random_image(0, 30, 50), padding_side="right", return_tensors="pt")
    assert right["attention_mask"][0, 0] == 1 and right["attention_mask"][0, -1] == 0
    with torch.no_grad():
        expected = pair.model(**left).logits[left["attention_mask"].bool()]
        assert relative_error(pair.model(**right).logits[right["attention_mask"].bool()], expected) < TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_decoding_of_64_tokens_matches_jax(pair, tied):
    pair = pair("align", tied)
    generator = Generator(pair.config, pair.params, end_ids=[NEVER], pad_id=pair.chat.pad_id, batch_size=4)
    expected = generator.generate(pair.prompts(*MIXED.values()), 64)
    # The comparison means little if an answer repeats a single token.
    assert all(len(answer) == 64 and len(set(answer.tolist())) > 3 for answer in expected)

    def answers(*conversations):
        inputs = pair.inputs(*conversations)
        sequences = pair.model.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=NEVER)
        return sequences[:, inputs["input_ids"].shape[1] :].numpy()

    np.testing.assert_array_equal(answers(*MIXED.values()), np.stack(expected))
    for conversation, answer in zip(MIXED.values(), expected, strict=True):
        np.testing.assert_array_equal(answers(conversation)[0], answer)


@pytest.mark.parametrize("kwargs", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_other_caches_give_the_same_answer(pair, kwargs):
    pair = pair()
    inputs = pair.inputs(TEXT, SEVERAL)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": NEVER, "disable_compile": True}
    expected = pair.model.generate(**inputs, **settings)
    assert torch.equal(pair.model.generate(**inputs, **settings, **kwargs), expected)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_sequences_generated_in_a_batch_match_separate_ones(pair, num_beams):
    """Rows are repeated for beams and samples, and each must keep its own tiles."""
    pair = pair("align", tied=False)
    settings = {"max_new_tokens": 4, "eos_token_id": NEVER, "num_beams": num_beams, "num_return_sequences": 3}
    settings |= {"do_sample": num_beams == 1, "top_k": 0, "temperature": 1e-3}  # practically greedy
    inputs = pair.inputs(SEVERAL, TEXT, ONE)
    together = pair.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    assert together.shape == (9, 4)
    for index, conversation in enumerate([SEVERAL, TEXT, ONE]):
        inputs = pair.inputs(conversation)
        alone = pair.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(together[3 * index : 3 * index + 3], alone)


def test_tiles_follow_repeated_rows(pair):
    pair = pair()
    inputs = pair.inputs(SEVERAL, TEXT, ask("a", random_image(5, 20, 20)))
    _, expanded = pair.model._expand_inputs_for_generation(expand_size=2, **inputs)
    tiles = inputs["pixel_values"]
    assert len(tiles) == 6
    order = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 5]
    assert torch.equal(expanded["pixel_values"], tiles[order])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # transformers 5.0 lacks the new name.
@pytest.mark.parametrize("connector", CONNECTORS)
def test_loss_and_gradients_match_jax(trained, connector):
    pair, inputs, expected, gradients, _ = trained(connector)
    for checkpointing in (False, True):
        if checkpointing:
            pair.model.gradient_checkpointing_enable({"use_reentrant": False})
        pair.model.train()
        pair.model.zero_grad()
        output = pair.model(**inputs)
        output.loss.backward()
        assert relative_error(output.loss, expected) < TOLERANCE
        grads = {name: parameter.grad for name, parameter in pair.model.named_parameters()}
        assert grads.keys() == gradients.keys()
        for name, gradient in gradients.items():
            if name.endswith("k_proj.bias"):
                continue  # Zero up to rounding, because a bias on the keys does not change a softmax.
            difference = np.linalg.norm(grads[name].numpy() - gradient)
            assert difference < TOLERANCE * np.linalg.norm(gradient), name
    pair.model.gradient_checkpointing_disable()
    pair.model.eval()


def test_the_loss_is_divided_by_the_trainers_count(trained):
    pair, inputs, *_ = trained("align")
    with torch.no_grad():
        output = pair.model(**inputs)
        count = int((inputs["labels"] != -100).sum())
        assert torch.isclose(pair.model(**inputs, num_items_in_batch=2 * count).loss * 2, output.loss)
        assert torch.isclose(pair.model(**inputs, num_items_in_batch=torch.tensor(count)).loss, output.loss)
        assert pair.model(**{**inputs, "labels": torch.full_like(inputs["labels"], -100)}).loss == 0.0
    # The loss of transformers for the same logits.
    vocab_size = pair.config.language.vocab_size
    theirs = pair.model.loss_function(logits=output.logits, labels=inputs["labels"], vocab_size=vocab_size)
    assert torch.isclose(theirs, output.loss)


def test_exchanging_tiles_or_rows_of_patches_changes_the_logits(pair):
    """The change is far larger than the tolerance, so the tests above would notice a wrong order."""
    pair = pair()
    inputs = pair.inputs(ONE)
    pixels = inputs["pixel_values"]
    rows = pixels.clone()
    rows[1, :, :6], rows[1, :, 6:12] = pixels[1, :, 6:12], pixels[1, :, :6]
    with torch.no_grad():
        expected = pair.model(**inputs).logits[:, -1]
        for changed in (pixels[[0, 2, 1, 3, 4]], rows):
            logits = pair.model(**{**inputs, "pixel_values": changed}).logits[:, -1]
            assert relative_error(logits, expected) > 100 * TOLERANCE


def test_align_is_peaked_in_these_tests(pair):
    """With flat distributions, the tests above would not notice mistakes in ALIGN."""
    pair = pair()
    with torch.no_grad():
        features = pair.model.model.vision_tower(pair.inputs(ONE)["pixel_values"]).last_hidden_state
        p = pair.model.model.connector.distribution(features)
    assert p.shape == (5, 9, 330)
    entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)
    assert entropy.exp().mean() < 20 and len(p.argmax(-1).unique()) > 10


def test_different_counts_of_image_tokens_and_visual_tokens_are_refused(pair):
    pair = pair()
    inputs = pair.inputs(ONE)
    with pytest.raises(ValueError, match="45 image tokens for 36 visual tokens"):
        pair.model(**{**inputs, "pixel_values": inputs["pixel_values"][:-1]})
    with pytest.raises(ValueError, match="45 image tokens for 0 visual tokens"):
        pair.model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="0 image tokens for 45 visual tokens"):
        pair.model(input_ids=pair.inputs(TEXT)["input_ids"], pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="require `input_ids`, which mark the places"):
        pair.model(inputs_embeds=torch.zeros(1, 4, 32), pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="either"):
        pair.model()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_implementation_can_be_chosen(pair, implementation):
    pair = pair()
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        pair.folder, trust_remote_code=True, attn_implementation=implementation
    )
    parts = (model.model.vision_tower.vision_model.encoder.layers[0], model.model.language_model.layers[0])
    assert [part.self_attn.config._attn_implementation for part in parts] == [implementation] * 2
    inputs = pair.inputs(TEXT, ONE)
    with torch.no_grad():
        mask = inputs["attention_mask"].bool()
        assert relative_error(model(**inputs).logits[mask], pair.model(**inputs).logits[mask]) < TOLERANCE


@pytest.mark.parametrize("connector", CONNECTORS)
def test_a_folder_saved_by_transformers_gives_the_same_logits(pair, connector, tmp_path):
    """`save_pretrained` keeps names and weights, and copies the code files."""
    pair = pair(connector, tied=connector != "mlp")
    folder = tmp_path / "again"
    pair.model.save_pretrained(folder)
    pair.processor.save_pretrained(folder)
    with safetensors.safe_open(folder / "model.safetensors", framework="np") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}
    expected = state_dict(pair.config, pair.params)
    assert saved.keys() == expected.keys()
    assert all(np.array_equal(saved[name], expected[name]) for name in saved)

    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = dataclasses.replace(pair, processor=processor).inputs(SEVERAL)
    assert all(torch.equal(inputs[name], value) for name, value in pair.inputs(SEVERAL).items())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, pair.model(**inputs).logits)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_from_config_initializes_every_weight(pair, connector):
    """A missing initialization would leave arbitrary content of memory in a weight."""
    config = pair(connector, tied=connector != "mlp").model.config
    model = transformers.AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and parameter.abs().max() < 10, name
        if parameter.ndim > 1:
            assert parameter.std() > 1e-3, name
    if connector == "align":
        assert (model.model.connector.vocab_norm.weight == 2.0).all()
        assert (model.model.connector.vocab_norm.bias == 0.0).all()


def test_bfloat16_gives_similar_visual_tokens(pair):
    pair = pair()
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        pair.folder, trust_remote_code=True, dtype=torch.bfloat16
    )
    inputs = pair.inputs(ONE)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert logits.dtype == torch.bfloat16
        visual = model.get_image_features(inputs["pixel_values"]).pooler_output
        expected = pair.model.get_image_features(inputs["pixel_values"]).pooler_output
    assert visual.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(visual.float(), expected, dim=-1)
    assert cosine.median() > 0.99
