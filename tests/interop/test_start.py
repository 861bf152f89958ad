"""Configs that state only what they change: the rest comes from the backbones or the checkpoint of the run."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from alignvlm_jax.backbones import backbone_folder
from alignvlm_jax.checkpoints.weights import write_checkpoint
from alignvlm_jax.config import load_config
from alignvlm_jax.config.serialization import config_from_dict, config_to_dict
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import published
from alignvlm_jax.models.connectors import AlignConfig, MLPConfig
from alignvlm_jax.training import config_changes
from tests.interop import exported

STAGES = "stages=[dict(name='s', mixture=[dict(dataset='d')], steps=1)]"


@pytest.fixture
def partial(tmp_path):
    """Writes a config file with these further keys of `get_config`, and returns its path."""

    def write(keys: str = "") -> str:
        path = tmp_path / "partial.py"
        path.write_text(f"def get_config():\n    return dict({STAGES}, {keys})\n")
        return str(path)

    return write


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with another geometry, connector, tiling and packing than the defaults."""
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    config = exported.tiny_config("align")
    raw = config_to_dict(config)
    raw["model"]["language"] |= {"remat": "full", "dtype": "bfloat16"}
    config = config_from_dict(raw)
    write_checkpoint(folder, config, exported.random_params(config.model), exported.nano_tokenizer(), history=[])
    return folder, config


def copy_backbone(part, folder, **changes):
    """Copies the `config.json` of a nano backbone, with other values."""
    folder.mkdir()
    raw = json.loads((backbone_folder(part, "nano") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
    return folder


def test_a_config_without_a_model_has_that_of_its_backbones(partial):
    nano = load_config("nano.py", ["model.connector.vocab_scale_init=1.0"]).model
    config = load_config(partial())
    assert dataclasses.replace(config.model, connector=nano.connector) == dataclasses.replace(
        nano, language=dataclasses.replace(nano.language, head_dim=config.model.language.head_dim)
    )
    assert config.model.connector == AlignConfig() and config.data.tiling.tile_size == 80
    assert config_from_dict(config_to_dict(config)) == config


def test_the_config_and_the_command_line_state_what_they_change(partial):
    file = partial("model=dict(connector=dict(name='align', vocab_size=500), language=dict(remat='full'))")
    model = load_config(file).model
    assert (model.language.remat, model.language.num_layers) == ("full", 4) and model.connector.vocab_size == 500
    assert load_config(file, ["model.connector=mlp"]).model.connector == MLPConfig()
    assert load_config(file, ["data.tiling.rule=anyres_max_9"]).model.newline


def test_a_contradiction_is_refused_with_both_values(partial, checkpoint):
    with pytest.raises(UserError, match=r"config\.model\.vision .*num_layers 5 \(the folder says 4\).*Leave them out"):
        load_config(partial("model=dict(vision=dict(num_layers=5))"))
    with pytest.raises(
        UserError, match=r"model\.language .*nano/language: rope_theta 5\.0 \(the folder says 10000\.0\)"
    ):
        load_config(partial(), ["model.language.rope_theta=5"])
    folder, _ = checkpoint
    with pytest.raises(UserError, match=rf"model\.language .*{folder}: num_layers 5 \(the folder says 3\)"):
        load_config(partial(), [f"init_from={folder}", "model.language.num_layers=5"])
    with pytest.raises(UserError, match=r"model\.connector is MLPConfig.*has AlignConfig"):
        load_config(partial(), [f"init_from={folder}", "model.connector=mlp"])
    with pytest.raises(UserError, match="newline is True, but .* was trained without a newline"):
        load_config(partial(), [f"init_from={folder}", "data.tiling.rule=anyres_max_9"])


def test_rounding_to_float32_is_no_contradiction(partial, tmp_path):
    rounded = float(np.float32(1e-5))
    assert rounded == 9.999999747378752e-06
    folder = copy_backbone("language", tmp_path / "language", rms_norm_eps=rounded)
    # The rounded number is read as the one that it was made from.
    assert load_config(partial(), [f"backbones.language={folder}"]).model.language.rms_norm_eps == 1e-5
    for stated in (1e-5, rounded):
        overrides = [f"backbones.language={folder}", f"model.language.rms_norm_eps={stated}"]
        assert load_config(partial(), overrides).model.language.rms_norm_eps == stated
    with pytest.raises(UserError, match=r"rms_norm_eps 1\.1e-05 \(the folder says 1e-05\)"):
        load_config(partial(), [f"backbones.language={folder}", "model.language.rms_norm_eps=1.1e-5"])


def test_a_checkpoint_tells_the_model_the_tiles_and_the_bins(partial, checkpoint):
    folder, source = checkpoint
    config = load_config(partial("model=dict(vision=dict(remat='full'))"), [f"init_from={folder}"])
    assert config.model.connector == source.model.connector == AlignConfig(vocab_size=480)
    assert config.model.vision == dataclasses.replace(source.model.vision, remat="full")
    # How the weights are computed with is a matter of the run.
    assert config.model.language == dataclasses.replace(source.model.language, remat="none", dtype="auto")
    assert (config.data.tiling, config.data.packing) == (source.data.tiling, source.data.packing)
    overrides = [f"init_from={folder}", "data.packing.bins_per_microbatch=2", "data.tiling.max_tiles=1"]
    config = load_config(partial(), overrides)
    assert config.data.packing == dataclasses.replace(source.data.packing, bins_per_microbatch=2)
    assert config.data.tiling == dataclasses.replace(source.data.tiling, max_tiles=1)


def test_added_rows_are_not_words(partial):
    config = load_config(partial(), ["model.language.vocab_size=576"])
    assert config.model.language.vocab_size == 576 and config.model.connector == AlignConfig(vocab_size=512)
    with pytest.raises(UserError, match=r"vocab_size 448 \(the folder says 512\)"):
        load_config(partial(), ["model.language.vocab_size=448"])


def test_published_geometry_stands_in_for_missing_folders(partial, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("Llama-3.1-8B", "llama-3.1-8b-instruct", "/models/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B@main")
    for name in names:
        model = load_config(partial(), [f"backbones.language={name}"]).model
        assert model.language.hidden_size == 4096 and not model.language.tie_word_embeddings
    # Another organization's model of this name may be another model. A folder is what it says.
    assert published.find("language", "someone/Llama-3.1-8B") is None
    copy_backbone("language", tmp_path / "Llama-3.1-8B")
    assert load_config(partial(), ["backbones.language=Llama-3.1-8B"]).model.language.hidden_size == 128


def test_the_shipped_configs_need_no_network(hub):
    for size, width in (("1b", 2048), ("3b", 3072), ("8b", 4096)):
        assert load_config(f"alignvlm_{size}.py").model.language.hidden_size == width
    with pytest.raises(UserError, match="is not the model in meta-llama/Llama-3.2-1B-Instruct"):
        load_config("alignvlm_1b.py", ["model.language.hidden_size=64"])
    assert hub.requests == []


def test_another_model_on_the_hub_tells_its_geometry(hub, partial):
    hub.add("org/llama", {path.name: path.read_bytes() for path in backbone_folder("language", "nano").iterdir()})
    language = load_config(partial(), ["backbones.language=org/llama"]).model.language
    assert language.hidden_size == 128 and "model.safetensors" not in hub.downloads()


def test_random_weights_take_a_shape_and_its_changes(partial):
    random = ["backbones.language=random:llama-3.2-1b", "model.language.num_layers=2"]
    language = load_config(partial(), random).model.language
    assert (language.num_layers, language.hidden_size, language.rope_scaling.factor) == (2, 2048, 32.0)
    with pytest.raises(UserError, match=r"model\.vision: does not state patch_size, .*random:NAME.*siglip-so400m"):
        load_config(partial("model=dict(vision=dict(image_size=64))"), ["backbones.vision=random"])


def test_a_missing_folder_is_named_unless_the_config_states_every_size(partial, tmp_path):
    gone = tmp_path / "gone"
    for key in ("backbones.language", "init_from"):
        with pytest.raises(UserError, match=rf"^config\.{key}: {gone}"):
            load_config(partial(), [f"{key}={gone}"])
        assert load_config("nano.py", [f"{key}={gone}"]).model.language.num_layers == 4
    with pytest.raises(UserError, match=r"^config\.init_from: nano is an exported folder"):
        load_config(partial(), ["init_from=nano"])


def test_a_run_of_an_earlier_version_resumes_with_a_partial_config(partial):
    """Its config has a computed head width, and an epsilon with the digits of float32."""
    config = load_config(partial())
    old = config_to_dict(config)
    old["model"]["language"] |= {"head_dim": None, "rms_norm_eps": 9.999999747378752e-06}
    assert config.model.language.head_dim == 32
    assert config_changes.compare(old, config) == []
    old["model"]["language"]["head_dim"] = 16
    assert [change.key for change in config_changes.compare(old, config)] == ["model.language.head_dim"]


def test_a_start_in_a_bucket(partial, checkpoint, gcs_bucket):
    """The weights of a backbone are not needed for its geometry."""
    folder, source = checkpoint
    bucket = epath.Path(gcs_bucket)
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        (bucket / "start" / file.relative_to(folder)).write_bytes(file.read_bytes())
    config = load_config(partial(), [f"init_from={gcs_bucket}/start"])
    assert config.model.connector == source.model.connector and config.data.packing == source.data.packing
    language = json.loads((backbone_folder("language", "nano") / "config.json").read_text())
    (bucket / "language" / "config.json").write_text(json.dumps({**language, "num_hidden_layers": 7}))
    config = load_config(partial(), [f"backbones.language={gcs_bucket}/language"])
    assert config.model.language.num_layers == 7
