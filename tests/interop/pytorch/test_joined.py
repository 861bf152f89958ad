"""Joined tiles (anyres_max_9) in PyTorch, compared with JAX; tests/models/test_newline.py tests JAX itself."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers

from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.inference.generate import pad_prompts
from alignvlm_jax.inference.reader import Reader
from alignvlm_jax.models.alignvlm import AlignVLM
from tests.interop.pytorch.folders import ask, make_config, make_params, random_image, relative_error, write_folder

TILING = TilingConfig("anyres_max_9", tile_size=20, max_tiles=2, grid_side=3)
# In turn, a page that is shrunk, one that is cut into two rows of cells, and one that is padded with a border.
PAGES = [random_image(0, 60, 55), random_image(1, 20, 40), random_image(2, 33, 15)]
QUESTION = "What is the total?"


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """The reader in JAX, and the model and processor in PyTorch."""
    config = dataclasses.replace(make_config(), newline=True)
    params = make_params(config)
    folder = write_folder(tmp_path_factory.mktemp("exported") / "joined", config, params, TILING)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    chat = ChatTokenizer.from_folder(folder.parent / "joined_chat")
    return Reader(config, params, chat, TILING), model, processor


def _inputs(processor, conversations):
    return processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


def test_ids_logits_and_gradients_match_jax(joined):
    reader, model, processor = joined
    prompts = [reader.prompts(page, [QUESTION])[0] for page in PAGES]
    inputs = _inputs(processor, [ask(QUESTION, page) for page in PAGES])
    not_padding = inputs["attention_mask"].bool()
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(inputs["input_ids"][row][not_padding[row]], prompt.tokens)
    batch = pad_prompts(prompts, rows=3, tile_size=20, pad_id=reader.tokenizer.pad_id)
    last = np.array([len(prompt.tokens) - 1 for prompt in prompts])
    cotangent = np.random.default_rng(0).standard_normal((3, 352)).astype(np.float32)

    def weighted_logits(params):
        logits = AlignVLM(reader.config).apply({"params": params}, batch).logits[np.arange(3), last]
        return (logits * cotangent).sum(), logits

    params = reader.generator.variables["params"]
    (_, expected), gradients = jax.jit(jax.value_and_grad(weighted_logits, has_aux=True))(params)
    logits = model(**inputs).logits[:, -1]  # The last token of every row, because padding is on the left.
    assert relative_error(logits, expected) < 1e-4
    (logits * torch.tensor(cotangent)).sum().backward()
    assert relative_error(model.model.image_newline.grad, gradients["connector"]["newline"]) < 1e-3
    ours = gradients["connector"]["w1"]["kernel"].T
    assert relative_error(model.model.connector.w1.weight.grad, ours) < 1e-3
    model.zero_grad()


def test_greedy_decoding_matches_jax_and_beams_keep_their_pages(joined):
    """Rows are repeated for beams, and each must keep the tiles of its own page."""
    reader, model, processor = joined
    expected = reader.ask_batch(PAGES, [QUESTION] * 3, max_new_tokens=6)
    inputs = _inputs(processor, [ask(QUESTION, page) for page in PAGES])
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = [reader.tokenizer.decode([int(i) for i in row]).strip() for row in generated]
    assert answers == expected and len(set(answers)) == 3
    together = model.generate(**inputs, max_new_tokens=4, num_beams=2, num_return_sequences=2, do_sample=False)
    for row, page in enumerate(PAGES):
        alone = _inputs(processor, [ask(QUESTION, page)])
        beams = model.generate(**alone, max_new_tokens=4, num_beams=2, num_return_sequences=2, do_sample=False)
        np.testing.assert_array_equal(together[2 * row : 2 * row + 2, -4:], beams[:, -4:])


def test_visual_sources_follow_repeated_rows(joined):
    """If images are not encoded yet, the tiles of a row are repeated together with their sources."""
    _, model, processor = joined
    inputs = _inputs(processor, [ask(QUESTION, PAGES[0]), ask("no page"), ask(QUESTION, *PAGES[1:])])
    ids, expanded = model._expand_inputs_for_generation(expand_size=2, **inputs)
    assert len(expanded["pixel_values"]) == len(expanded["visual_sources"]) == 2 * len(inputs["pixel_values"])
    repeated = model(input_ids=ids, **expanded).logits
    torch.testing.assert_close(repeated, model(**inputs).logits.repeat_interleave(2, dim=0), atol=1e-4, rtol=1e-4)


def test_images_can_be_sliced_apart_and_joined_in_other_batches(joined):
    """vLLM slices every input by tiles, caches images, and encodes those of several requests together."""
    _, model, processor = joined
    names = ("pixel_values", "visual_sources", "visual_weights")
    together = processor.image_processor(PAGES, return_tensors="pt")
    expected = model.model.get_image_features(*(together[name] for name in names)).pooler_output[:, 0]
    sizes = together["num_tiles"].tolist()
    images = [[parts[i] for parts in (together[name].split(sizes) for name in names)] for i in range(3)]
    shuffled = [torch.cat(parts) for parts in zip(*(images[i] for i in (2, 0, 1)), strict=True)]
    grid = torch.tensor([[1, 1, sizes[i]] for i in (2, 0, 1)])
    per_image = model.model.get_image_features(*shuffled, image_grid_thw=grid).pooler_output
    assert [len(tokens) for tokens in per_image] == together["num_visual_tokens"][[2, 0, 1]].tolist()
    torch.testing.assert_close(torch.cat([per_image[1], per_image[2], per_image[0]]), expected)


def test_several_images_are_counted_and_missing_sources_are_refused(joined):
    reader, model, processor = joined
    inputs = _inputs(processor, [ask(QUESTION, *PAGES)])
    counts = [int((reader.prompts(page, [QUESTION])[0].visual_index >= 0).sum()) for page in PAGES]
    num_sources = (inputs["visual_weights"] != 0).any(dim=-1).sum()
    assert num_sources == sum(counts) == (inputs["input_ids"] == model.config.image_token_id).sum()
    sizes = [page.size[::-1] for page in PAGES]
    assert processor._get_num_multimodal_tokens(sizes).num_image_tokens == counts
    assert model(**inputs).logits.shape[-1] == 352
    with pytest.raises(ValueError, match="anyres_max_9"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
