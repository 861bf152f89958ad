"""What trainers read from a training step: the loss, its labels, logits on demand, and gradients."""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree
from transformers.utils import find_labels

from tests.interop.pytorch.folders import ask, random_image, relative_error

ONE = [*ask("What is the total?", random_image(0, 30, 50)), {"role": "assistant", "content": "12.50"}]


@pytest.fixture
def training(pair):
    """A model in training mode, inputs with labels, and the logits of evaluation mode."""
    pair = pair()
    batch = pair.inputs(ONE)
    batch["labels"] = batch["input_ids"].clone()
    with torch.no_grad():
        expected = pair.model(**batch).logits
    yield pair.model.train(), batch, expected
    pair.model.eval()
    pair.model.zero_grad()


@pytest.fixture
def heads(training, monkeypatch):
    """The numbers of positions for which the head is computed."""
    model, _, _ = training
    positions = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: positions.append(args[0].shape[:-1].numel()))
    yield positions
    hook.remove()


def test_logits_of_a_training_step_are_computed_when_they_are_read(training, heads):
    """huggingface/open-r1#404, huggingface/trl#4184: trainers read `outputs.logits` for entropy and accuracy."""
    model, batch, expected = training
    length = batch["labels"].shape[1]
    output = model(**batch)
    output["loss"].backward()
    assert output[0] is output.loss and sum(heads) < length  # Only the positions before a label.
    with torch.no_grad():
        assert relative_error(output.logits, expected) < 1e-5
    assert output["logits"] is output.logits is output[1] is output.get("logits") is dict(output)["logits"]
    assert any(value is output.logits for value in output.to_tuple()) and sum(heads) < 2 * length
    assert model(**batch, return_logits=False).logits is None
    assert model(**batch, logits_to_keep=2).logits.shape[1] == 2
    # Read with gradients, as for distillation, they have gradients.
    assert model(**batch).logits.requires_grad


def test_logits_can_be_read_after_the_wrappers_of_trainers(training, heads):
    """accelerate rebuilds outputs from their items, torch from their leaves; the head needs the trainer's autocast."""
    model, batch, expected = training
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
    rebuilt = type(output)({name: value.float() if torch.is_tensor(value) else value for name, value in output.items()})
    before = sum(heads)
    assert rebuilt.loss.dtype == torch.float32 and before < batch["labels"].shape[1]
    assert rebuilt.logits.shape == expected.shape and rebuilt.logits.dtype == torch.bfloat16
    leaves, structure = pytree.tree_flatten(model(**batch))
    assert relative_error(pytree.tree_unflatten(leaves, structure).logits, expected) < 1e-5
    assert torch.equal(copy.copy(output).logits, output.logits)


def test_image_tokens_are_no_labels(training):
    """huggingface/trl#4066: a collator leaves image tokens among the labels, for the model to exclude."""
    model, batch, _ = training
    without = {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == model.config.image_token_id, -100)}
    assert torch.equal(model(**batch).loss, model(**without).loss)
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    assert torch.equal(model(**inputs, shift_labels=shifted).loss, model(**batch).loss)
    # transformers' Trainer evaluates no loss if a batch lacks one of these.
    assert find_labels(type(model)) == ["labels"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # transformers 5.0 lacks the new name.
@pytest.mark.parametrize("trained", ["", "vision_tower", "connector"])
def test_gradients_are_the_same_with_both_forms_of_checkpointing(training, trained):
    """huggingface/peft#2880: with the reentrant form, an encoder whose input has no gradient got none."""
    model, batch, _ = training
    gradients = {}
    try:
        for form in (None, False, True):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trained in name)
            if form is not None:
                model.gradient_checkpointing_enable({"use_reentrant": form})
                model.enable_input_require_grads()
            model.zero_grad()
            model(**batch).loss.backward()
            gradients[form] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    finally:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        model.requires_grad_(True)
    for form in (False, True):
        for name, expected in gradients[None].items():
            assert gradients[form][name] is not None, name
            torch.testing.assert_close(gradients[form][name], expected)
