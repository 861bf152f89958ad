"""Export of checkpoints to PyTorch folders, which transformers loads with the same weights."""

import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
import yaml
from flax.traverse_util import flatten_dict

from alignvlm_jax.checkpoints.weights import restore_params, write_checkpoint
from alignvlm_jax.config.serialization import config_from_dict, config_to_dict
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import export
from alignvlm_jax.interop.import_pytorch import read_alignvlm
from alignvlm_jax.models.language import LanguageModel
from alignvlm_jax.models.vision import VisionEncoder
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from tests.interop.exported import CONNECTORS, HISTORY, make_checkpoint, nano_tokenizer, random_params, tiny_config
from tests.interop.pytorch.folders import random_image, relative_error

_KILOBYTE = 1000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("align") / "checkpoint", tied=False)


@pytest.fixture(scope="module")
def folder(checkpoint):
    """An export in shards of 20 kB."""
    out = checkpoint.parent / "exported"
    export.export_alignvlm(checkpoint, out, max_shard_bytes=20 * _KILOBYTE)
    return out


def _load(folder, **kwargs):
    """Loads the exported model and asserts that no key is missing, unknown or of another shape."""
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **kwargs
    )
    assert not any(report.values()), report
    return model.eval()


def _tensors(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


@pytest.mark.parametrize("connector", CONNECTORS)
def test_transformers_finds_every_weight_of_every_connector(connector, tmp_path):
    """No key is missing, unknown or of another shape, and the values are in torch's layout."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", connector)
    export.export_alignvlm(checkpoint, tmp_path / "out")
    state = _load(tmp_path / "out").state_dict()
    assert "lm_head.weight" in state  # It is tied to the embedding table, so the file does not contain it.
    assert "lm_head.weight" not in _tensors(tmp_path / "out")
    params = {"/".join(path): leaf for path, leaf in flatten_dict(random_params(tiny_config(connector).model)).items()}
    total = sum(leaf.size for leaf in params.values())
    assert sum(tensor.numel() for tensor in state.values()) - state["lm_head.weight"].numel() == total
    gate = state["model.language_model.layers.1.mlp.gate_proj.weight"].numpy()
    np.testing.assert_array_equal(gate, params["language/layers/mlp/gate/kernel"][1].T)
    checks = {
        "align": ("connector.w2.weight", params.get("connector/w2")),
        "mlp": ("connector.linear_in.weight", np.transpose(params.get("connector/linear_in/kernel", 0))),
        "ovis": ("connector.table.weight", params.get("connector/table")),
        "h_reducer": ("connector.project.weight", np.transpose(params.get("connector/project/kernel", 0))),
        "c_abstractor": ("connector.readout_in.weight", np.transpose(params.get("connector/readout_in/kernel", 0))),
        "perceiver": ("connector.layers.1.out.weight", np.transpose(params.get("connector/layer_1/out/kernel", 0))),
    }
    key, expected = checks[connector]
    np.testing.assert_array_equal(state[f"model.{key}"].numpy(), expected)


def test_shards_load_in_transformers(folder, checkpoint):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3
    assert files == {path.name for path in folder.glob("*.safetensors")}
    export.export_alignvlm(checkpoint, folder.parent / "unsharded")
    assert [path.name for path in (folder.parent / "unsharded").glob("*.safetensors")] == ["model.safetensors"]
    sharded, unsharded = _load(folder).state_dict(), _load(folder.parent / "unsharded").state_dict()
    assert set(sharded) == set(unsharded)
    assert all(torch.equal(sharded[key], unsharded[key]) for key in unsharded)


def test_auto_classes_and_the_pipeline_give_the_same_answer(folder):
    model = _load(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert processor.image_processor.thumbnail and processor.image_processor.max_tiles == 3
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": random_image(0, 40, 20)}, {"type": "text", "text": "Total?"}],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    pipe = transformers.pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    (result,) = pipe(text=messages, max_new_tokens=5, return_full_text=False)
    assert result["generated_text"] == processor.decode(answer, skip_special_tokens=True)
    assert model.generation_config.eos_token_id == [1]
    assert model.generation_config.pad_token_id == 2


def test_a_sharded_checkpoint_gives_the_same_export(folder, tmp_path):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", tied=False, mesh=mesh)
    export.export_alignvlm(checkpoint, tmp_path / "out", max_shard_bytes=20 * _KILOBYTE)
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name


def test_weights_keep_their_dtype_or_are_rounded_once(checkpoint, folder, tmp_path):
    """By default weights keep the dtype of the checkpoint; to another dtype they are rounded directly."""
    export.export_alignvlm(checkpoint, tmp_path / "half", dtype="bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    full, half = _tensors(folder), _tensors(tmp_path / "half")
    for key, tensor in full.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(half[key], tensor.astype(ml_dtypes.bfloat16))
    assert _load(tmp_path / "half").dtype == torch.bfloat16

    stored = make_checkpoint(tmp_path / "checkpoint", tied=False, dtype="bfloat16")
    export.export_alignvlm(stored, tmp_path / "as_stored")
    assert json.loads((tmp_path / "as_stored" / "config.json").read_text())["dtype"] == "bfloat16"
    for key, tensor in _tensors(tmp_path / "as_stored").items():
        np.testing.assert_array_equal(tensor, half[key])


def test_the_exported_decoder_is_a_llama_with_the_same_logits(checkpoint, tmp_path):
    export.export_language(checkpoint, tmp_path / "llama", max_shard_bytes=20 * _KILOBYTE)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", output_loading_info=True)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert not any(report.values()), report
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    tokens = np.random.default_rng(0).integers(0, 512, (2, 90))  # Longer than the context before rotary scaling.
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(tokens)).logits
    config = tiny_config(tied=False).model.language

    def run(module, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = module(module.embed(tokens), positions=positions, segment_ids=jnp.ones_like(tokens))
        return module.logits(hidden)

    params = {"params": restore_params(checkpoint)["language"]}
    ours = LanguageModel(config).apply(params, jnp.asarray(tokens), method=run)
    assert relative_error(ours, theirs) < 1e-4
    assert tokenizer.apply_chat_template([{"role": "user", "content": "12"}], tokenize=False) == "<|begin|><|user|>12"


def test_the_exported_encoder_is_a_siglip_with_the_same_features(checkpoint, tmp_path):
    export.export_vision(checkpoint, tmp_path / "siglip")
    model, report = transformers.SiglipVisionModel.from_pretrained(tmp_path / "siglip", output_loading_info=True)
    assert not any(report.values()), report
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "siglip")
    pixels = processor(random_image(0, 16, 16), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = model.eval()(pixels).last_hidden_state
    params = {"params": restore_params(checkpoint)["vision"]}
    ours = VisionEncoder(tiny_config().model.vision).apply(params, pixels.numpy().transpose(0, 2, 3, 1))
    assert relative_error(ours, theirs) < 1e-4


def test_the_model_card_describes_the_training(folder):
    card = (folder / "README.md").read_text()
    _, front_matter, text = card.split("---\n", 2)
    front_matter = yaml.safe_load(front_matter)
    assert front_matter["library_name"] == "transformers"
    assert front_matter["pipeline_tag"] == "image-text-to-text"
    assert front_matter["license"] == "unknown"
    for passage in (
        "- vision: `siglip-x`",
        "- language: `llama-y`",
        "| captions | documents/train (transcribe) | vision, connector, language | 300 | 8 |",
        "| documents | documents/train (mixed) | vision, connector, language | 3 of 300 | 16 |",
        "| questions | documents/train (qa) | connector, language | 0 of 130 | 16 |",
        "7 optimizer steps in total",
        "up to 3 tiles of 16 px (rule `ovis`, and the whole page as a thumbnail)",
        "each tile becomes 16 visual tokens",
        "`align` (",
        "vocab_size 480",
        "licenses of the backbones",
    ):
        assert passage in text
    total = sum(leaf.size for leaf in flatten_dict(random_params(tiny_config(tied=False).model)).values())
    assert f"| all | {total:,} |" in text


def test_the_model_card_describes_earlier_runs(checkpoint, tmp_path):
    copied = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    earlier = config_to_dict(tiny_config("mlp"))
    earlier["stages"] = [{**earlier["stages"][0], "name": "warming-up"}]
    event = {"what": "trained", "config": earlier, "progress": {"step": 40, "stage": 0, "step_in_stage": 40}}
    (copied / "history.json").write_text(json.dumps([event]))
    export.export_language(copied, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.index("| warming-up |") < card.index("| captions |")
    assert "40 optimizer steps in total" in card


# Orbax leaves an event loop open when it reads damaged files.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("write", [export.export_alignvlm, export.export_language, export.export_vision])
def test_bad_requests_leave_nothing_behind(checkpoint, tmp_path, write):
    def refused(match, checkpoint, out=tmp_path / "out", **kwargs):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UserError, match=match):
            write(checkpoint, out, **kwargs)
        assert sorted(tmp_path.iterdir()) == before

    refused("no such folder", tmp_path / "nowhere")
    refused("expected one of float32, bfloat16, float16", checkpoint, dtype="int8")
    (tmp_path / "empty").mkdir()
    refused("is not a checkpoint", tmp_path / "empty")
    unfinished = shutil.copytree(checkpoint, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "checkpoints")
    refused("no finished checkpoint", unfinished)
    refused("is not empty", checkpoint, out=unfinished)
    edited = shutil.copytree(checkpoint, tmp_path / "edited")
    config = json.loads((edited / "config.json").read_text())
    config["model"]["language"] |= {"intermediate_size": 48, "tie_word_embeddings": True}
    (edited / "config.json").write_text(json.dumps(config))
    refused(
        r"language/lm_head is not part.*mlp/down/kernel has shape \[3, 24, 16\], the config says \[3, 48, 16\]", edited
    )
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    for file in damaged.glob("checkpoints/*/params/**/d/*"):
        file.write_bytes(file.read_bytes()[:-50])
    refused("none of its checkpoints is complete; step 7: .*bytes", damaged)


def test_the_newline_embedding_round_trips(tmp_path):
    """The newline embedding of anyres_max_9 and its config key are exported and imported."""
    raw = config_to_dict(tiny_config())
    raw["model"]["newline"] = True
    raw["data"]["tiling"] |= {"rule": "anyres_max_9", "grid_side": 2}
    config = config_from_dict(raw)
    params = random_params(config.model)
    write_checkpoint(tmp_path / "joined", config, params, nano_tokenizer(), history=HISTORY)
    restored = restore_params(tmp_path / "joined")["connector"]["newline"]
    np.testing.assert_array_equal(restored, params["connector"]["newline"])
    export.export_alignvlm(tmp_path / "joined", tmp_path / "out")
    np.testing.assert_array_equal(_tensors(tmp_path / "out")["model.image_newline"], restored)
    assert _load(tmp_path / "out").config.newline
    imported = read_alignvlm(tmp_path / "out")
    assert imported.config == config
    np.testing.assert_array_equal(imported.params["connector"]["newline"], restored)
