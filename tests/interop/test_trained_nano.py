"""The trained nano model gives the same answers in JAX and in PyTorch to questions held out from training.

Random weights would prove little: ALIGN's output would be almost the same for every patch, and a wrong order of tiles
or rows would go unnoticed.
"""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers

from alignvlm_jax.backbones import NANO_MODEL
from alignvlm_jax.data import images
from alignvlm_jax.data.synthetic.records import draw_records
from alignvlm_jax.evaluation import runner
from alignvlm_jax.inference.generate import pad_prompts
from alignvlm_jax.inference.reader import load
from alignvlm_jax.interop.export import export_alignvlm
from alignvlm_jax.interop.import_pytorch import import_alignvlm
from alignvlm_jax.models.alignvlm import AlignVLM
from tests.interop.pytorch.folders import relative_error

PARITY = 1e-4  # maximum relative error of logits between JAX and PyTorch, both in float32
_PAGES = 300  # The held-out set of the demo, with 1,049 questions.
_BATCH = 64
_NEW_TOKENS = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The shipped bfloat16 weights converted to float32."""
    folder = tmp_path_factory.mktemp("nano") / "checkpoint"
    import_alignvlm(NANO_MODEL, folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def reader(checkpoint):
    return load(checkpoint, batch_size=_BATCH)


@pytest.fixture(scope="module")
def exported(checkpoint):
    """The exported model and processor, loaded by transformers."""
    folder = checkpoint.parent / "exported"
    export_alignvlm(checkpoint, folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert model.dtype == torch.float32
    return model.eval(), transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def records():
    return draw_records(0, "heldout", 0, _PAGES)


def _inputs(processor, *pages_and_questions):
    """Returns the processor's inputs for pairs of a page and a question."""
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": page}, {"type": "text", "text": question}]}]
        for page, question in pages_and_questions
    ]
    return processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def _answers_in_pytorch(model, processor, records):
    """Returns PyTorch's answers to all questions of the records, in order."""
    questions = []
    for record in records:
        page = images.open_image(record["image"])
        pairs = zip(record["questions"], record["answers"], strict=True)
        questions += [(page, question, len(answer)) for question, answer in pairs]
    # Batches have answers of similar length, so that short ones do not wait for long ones.
    order = sorted(range(len(questions)), key=lambda i: questions[i][2])
    answers = [""] * len(questions)
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        inputs = _inputs(processor, *(questions[i][:2] for i in batch))
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)
        for i, row in zip(batch, output[:, inputs["input_ids"].shape[1] :], strict=True):
            answers[i] = processor.decode(row, skip_special_tokens=True).strip()
    return answers


@pytest.mark.parametrize("pages, questions", [(60, 206), pytest.param(_PAGES, 1049, marks=pytest.mark.large)])
def test_every_held_out_question_gets_the_same_answer(reader, exported, records, pages, questions):
    records = records[:pages]
    report = runner.evaluate(reader, records, max_new_tokens=_NEW_TOKENS)
    in_jax = [answer.predicted for answer in report.answers]
    in_pytorch = _answers_in_pytorch(*exported, records)
    expected = [answer.expected for answer in report.answers]
    num_right = {
        "JAX": sum(map(str.__eq__, in_jax, expected)),
        "PyTorch": sum(map(str.__eq__, in_pytorch, expected)),
    }
    print(f"exact match of {len(expected)} held-out questions:", num_right)
    assert len(expected) == questions
    assert in_pytorch == in_jax
    assert report.warnings == {}, "no warning about a page of the kind that the model is trained on"
    assert num_right["JAX"] == report.overall.right > 0.75 * len(expected)


def test_the_shipped_model_and_an_exported_folder_give_the_same_answer(reader, exported, checkpoint, records):
    page, question = images.open_image(records[0]["image"]), records[0]["questions"][0]
    expected = reader.ask(page, question)
    assert expected
    assert load("nano").ask(page, question) == expected
    assert load(checkpoint.parent / "exported").ask(page, question) == expected


def _logits_in_jax(reader, prompt):
    batch = pad_prompts([prompt], rows=1, tile_size=reader.tiling.tile_size, pad_id=reader.tokenizer.pad_id)
    model = AlignVLM(reader.config)
    logits = jax.jit(lambda variables, batch: model.apply(variables, batch).logits)(reader.generator.variables, batch)
    return np.asarray(logits)[:, : len(prompt.tokens)]


def _logits_in_pytorch(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits


def _exchange(array, axis, first, second):
    """Returns the array with two slices of an axis exchanged."""
    order = np.arange(array.shape[axis])
    order[first], order[second] = order[second].copy(), order[first].copy()
    return np.take(array, order, axis)


def _logit_change(reader, exported, record, change_jax, change_pytorch):
    """Asserts that JAX and PyTorch agree before and after a change of the tiles; returns the change of the logits."""
    model, processor = exported
    page, question = images.open_image(record["image"]), record["questions"][0]
    (prompt,) = reader.prompts(page, [question])
    inputs = _inputs(processor, (page, question))
    before = _logits_in_jax(reader, prompt)
    assert relative_error(before, _logits_in_pytorch(model, inputs)) < PARITY
    after = _logits_in_jax(reader, dataclasses.replace(prompt, **change_jax(prompt)))
    changed = torch.from_numpy(change_pytorch(inputs["pixel_values"].numpy()))
    assert relative_error(after, _logits_in_pytorch(model, {**inputs, "pixel_values": changed})) < PARITY
    is_text = prompt.visual_index < 0
    return relative_error(after[:, is_text], before[:, is_text])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_exchanging_tiles_or_rows_changes_the_logits(reader, exported, records, number):
    record = records[number]
    first, second = slice(0, 1), slice(1, 2)

    def exchange_tiles(prompt):
        return {
            "tiles": _exchange(prompt.tiles, 0, first, second),
            "tile_valid_hw": _exchange(prompt.tile_valid_hw, 0, first, second),
        }

    # 100 times the tolerance: a wrong order of tiles or rows could not pass as parity.
    tiles = _logit_change(reader, exported, record, exchange_tiles, lambda pixels: _exchange(pixels, 0, first, second))
    assert tiles > 100 * PARITY

    # Two adjacent rows of patches in the first tile; the upper one has the most ink.
    patch = reader.config.vision.patch_size
    (prompt,) = reader.prompts(images.open_image(record["image"]), ["?"])
    height = prompt.tile_valid_hw[0, 0] // patch
    ink = prompt.tiles[0, : height * patch].astype(float).reshape(height, -1).std(axis=1)
    row = min(int(ink.argmax()), height - 2)
    upper, lower = slice(row * patch, (row + 1) * patch), slice((row + 1) * patch, (row + 2) * patch)

    def exchange_rows(tiles, axis):
        return np.concatenate([_exchange(tiles[:1], axis, upper, lower), tiles[1:]])

    rows = _logit_change(
        reader,
        exported,
        record,
        lambda prompt: {"tiles": exchange_rows(prompt.tiles, axis=1)},
        lambda pixels: exchange_rows(pixels, axis=2),
    )
    assert rows > 100 * PARITY
    print(f"relative change of the logits: {tiles:.3f} (tiles exchanged), {rows:.3f} (rows exchanged)")
