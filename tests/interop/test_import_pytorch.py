"""Import of PyTorch folders: round trips are lossless, and other folders are refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from alignvlm_jax.checkpoints.weights import ParameterReader, read_page_scale, restore_params
from alignvlm_jax.data.chat import ChatTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop.export import export_alignvlm, export_language
from alignvlm_jax.interop.import_pytorch import import_alignvlm, read_alignvlm_config
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from tests.interop.exported import (
    CONNECTORS,
    HISTORY,
    assert_same_weights,
    make_checkpoint,
    nano_tokenizer,
    read_weights,
    tiny_config,
)

_CONVERSATION = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Total? <|end|>"}]},
    {"role": "assistant", "content": "12.50"},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("align") / "checkpoint", tied=False)


@pytest.fixture(scope="module")
def folder(checkpoint):
    out = checkpoint.parent / "exported"
    export_alignvlm(checkpoint, out, max_shard_bytes=20_000)
    return out


@pytest.fixture
def edited(folder, tmp_path):
    """A copy of the folder, for tests that edit it."""
    return shutil.copytree(folder, tmp_path / "edited")


def _edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _assert_refused(match, folder, tmp_path, **kwargs):
    """Asserts that importing the folder fails with a matching message and leaves nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=match):
        import_alignvlm(folder, tmp_path / "out", **kwargs)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("connector", "dtype"), [*((name, "float32") for name in CONNECTORS), ("align", "bfloat16")])
def test_round_trips_are_bit_exact(connector, dtype, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", connector, dtype=dtype)
    export_alignvlm(checkpoint, tmp_path / "folder")
    import_alignvlm(tmp_path / "folder", tmp_path / "back")
    assert_same_weights(read_weights(checkpoint), read_weights(tmp_path / "back"))
    before, after = ParameterReader(checkpoint), ParameterReader(tmp_path / "back")
    assert after.config == before.config == tiny_config(connector)
    assert (after.step, after.meta["progress"]) == (before.step, before.meta["progress"])
    assert after.step == 7 and after.history == HISTORY
    assert read_page_scale(tmp_path / "back") == 0.5

    export_alignvlm(tmp_path / "back", tmp_path / "again")
    for file in sorted((tmp_path / "folder").iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("number", [0, 3])
def test_a_removed_option_is_dropped_if_it_was_off(number, edited, checkpoint, tmp_path):
    """Folders of earlier versions hold the key, in config.json and in the config of the exported run."""
    file = edited / "config.json"
    _edit_json(file, connector_config={**json.loads(file.read_text())["connector_config"], "num_extra_words": number})
    if number:
        _assert_refused(r"config\.json.* config\.model\.connector\.num_extra_words: .*number 3", edited, tmp_path)
        with pytest.raises(ValueError, match="num_extra_words was removed, expected 0, got 3"):
            transformers.AutoConfig.from_pretrained(edited, trust_remote_code=True)
        return
    import_alignvlm(edited, tmp_path / "back")
    assert ParameterReader(tmp_path / "back").config == ParameterReader(checkpoint).config
    config = transformers.AutoConfig.from_pretrained(edited, trust_remote_code=True)
    assert "num_extra_words" not in config.connector_config


def test_the_tokenizer_round_trips(checkpoint, folder, tmp_path):
    import_alignvlm(folder, tmp_path / "back")
    before, after = nano_tokenizer(), ChatTokenizer.from_folder(tmp_path / "back" / "tokenizer")
    assert (after.end_ids, after.pad_id, after.image_id) == (before.end_ids, before.pad_id, before.image_id)
    for left, right in zip(before.encode(_CONVERSATION, [3]), after.encode(_CONVERSATION, [3]), strict=True):
        np.testing.assert_array_equal(left, right)


def test_weights_can_be_imported_onto_a_mesh_and_in_another_dtype(checkpoint, folder, tmp_path):
    import_alignvlm(folder, tmp_path / "back", mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), dtype="bfloat16")
    halves = {name: array.astype("bfloat16") for name, array in read_weights(checkpoint).items()}
    assert_same_weights(halves, read_weights(tmp_path / "back"))


def test_a_model_trained_and_saved_in_pytorch_is_imported(folder, tmp_path):
    """`save_pretrained` does not write alignvlm_training.json: model and tiling are read from transformers' files."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "trained", max_shard_size="30KB")
    processor.save_pretrained(tmp_path / "trained")
    import_alignvlm(tmp_path / "trained", tmp_path / "back")
    changed = read_weights(tmp_path / "back")
    import_alignvlm(folder, tmp_path / "unchanged")
    for name, array in read_weights(tmp_path / "unchanged").items():
        np.testing.assert_array_equal(changed[name], 1.5 * array, err_msg=name)
    reader = ParameterReader(tmp_path / "back")
    assert reader.step == 0
    assert reader.config.data.tiling == tiny_config().data.tiling
    imported, original = reader.config.model, tiny_config(tied=False).model
    assert imported.connector == original.connector
    # The folder states the compute dtype, which the original config left to the device.
    assert imported.vision == dataclasses.replace(original.vision, dtype="float32")
    assert imported.language == dataclasses.replace(original.language, dtype="float32")
    assert [event["what"] for event in reader.history] == ["saved by PyTorch"]
    tokenizer = ChatTokenizer.from_folder(tmp_path / "back" / "tokenizer")
    assert tokenizer.end_ids == nano_tokenizer().end_ids
    expected = nano_tokenizer().encode(_CONVERSATION, [3])
    for left, right in zip(expected, tokenizer.encode(_CONVERSATION, [3]), strict=True):
        np.testing.assert_array_equal(left, right)

    export_alignvlm(tmp_path / "back", tmp_path / "again")
    exported = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert all(torch.equal(value, exported.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_model_saved_over_the_export_does_not_count_as_the_exported_run(edited, tmp_path):
    """`save_pretrained` writes its version to config.json and leaves alignvlm_training.json as it is."""
    _edit_json(edited / "config.json", transformers_version="5.23.0")
    import_alignvlm(edited, tmp_path / "back")
    reader = ParameterReader(tmp_path / "back")
    assert reader.step == 0
    assert [event["what"] for event in reader.history] == ["joined by a test", "trained", "saved by PyTorch"]
    assert reader.config == tiny_config(tied=False)
    export_alignvlm(tmp_path / "back", tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert card.index("siglip-x") < card.index("7 optimizer steps in total") < card.index("Saved by PyTorch")


def test_a_folder_without_the_code_is_imported(edited, tmp_path):
    for file in [*edited.glob("*.py"), edited / "README.md", edited / "generation_config.json"]:
        file.unlink()
    import_alignvlm(edited, tmp_path / "back")
    assert jax.tree.leaves(restore_params(tmp_path / "back"))


def test_tensors_that_do_not_fit_are_reported_together(edited, tmp_path):
    index = json.loads((edited / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors |= safetensors.numpy.load_file(edited / file)
        (edited / file).unlink()
    (edited / "model.safetensors.index.json").unlink()
    del tensors["model.connector.w1.bias"]
    tensors["model.connector.w2.weight"] = tensors["model.connector.w2.weight"][:100]
    tensors["model.connector.gate.weight"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(tensors, edited / "model.safetensors")
    problems = (
        r"w1.bias is missing.*w2.weight has shape \[100, 16\], the config says \[480, 16\].*gate.weight is not part"
    )
    _assert_refused(problems, edited, tmp_path)


def test_folders_of_other_models_are_refused(checkpoint, edited, tmp_path):
    export_language(checkpoint, tmp_path / "llama")
    _assert_refused("model_type is 'llama', expected 'alignvlm'.*alignvlm import", tmp_path / "llama", tmp_path)
    _assert_refused("no config.json", tmp_path / "nowhere", tmp_path)
    _edit_json(edited / "config.json", connector_config={"name": "qformer"})
    _assert_refused("connector.name: expected one of align, mlp.*got 'qformer'", edited, tmp_path)
    _edit_json(edited / "config.json", connector_config=None, text_config=[])
    _assert_refused("config.json: it has no text_config, connector_config", edited, tmp_path)
    (edited / "config.json").write_text("{")
    _assert_refused("config.json is not JSON", edited, tmp_path)


def test_parts_that_do_not_belong_together_are_refused(edited, tmp_path):
    _edit_json(edited / "config.json", image_token_id=5)
    _assert_refused("image token has id 3, config.json's is 5", edited, tmp_path)
    _edit_json(edited / "config.json", image_token_id=3)
    shard = min(edited.glob("model-*.safetensors"))
    shard.rename(tmp_path / "shard")
    _assert_refused(f"{shard.name} is missing", edited, tmp_path)
    (tmp_path / "shard").rename(shard)
    (edited / "alignvlm_training.json").write_text('{"config": {}}')
    _assert_refused("not a file that `export_alignvlm` wrote.*remove it", edited, tmp_path)
    (edited / "alignvlm_training.json").unlink()
    (edited / "processor_config.json").write_text('{"image_processor": {"tile_size": 16}}')
    _assert_refused("has no rule, max_tiles, thumbnail", edited, tmp_path)


def test_a_workdir_that_is_not_empty_is_refused_before_reading(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    _assert_refused("is not empty", folder, tmp_path)
    assert (tmp_path / "out" / "precious").exists()


def test_the_dtype_key_of_transformers_4_is_read(edited):
    """transformers 4.56 renamed `torch_dtype` to `dtype`; folders saved before have the old key."""
    (edited / "alignvlm_training.json").unlink()
    config = json.loads((edited / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        for dtype in ("float32", "bfloat16"):
            (edited / "config.json").write_text(json.dumps({**config, "dtype": None, key: dtype}))
            assert read_alignvlm_config(edited).model.language.dtype == dtype
