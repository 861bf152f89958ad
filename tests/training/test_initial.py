"""Initial weights of stage 1: unchanged backbones, a seeded connector, and W2 as a copy of the LM head."""

import dataclasses
import json
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

from alignvlm_jax.backbones import NANO_MODEL, backbone_folder
from alignvlm_jax.checkpoints.weights import write_checkpoint
from alignvlm_jax.config.experiment import BackbonesConfig, ExperimentConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop.huggingface import save_language_folder, save_vision_folder
from alignvlm_jax.models.alignvlm import AlignVLMConfig, parameter_shapes, random_parameters
from alignvlm_jax.models.connectors import MLPConfig, connector_names
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.parallel.sharding import parameter_shardings
from alignvlm_jax.training.initial import initial_parameters, load_tokenizer
from tests.interop import exported
from tests.training.batches import MODEL


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Folders of random backbones, and their weights."""
    folder = tmp_path_factory.mktemp("backbones")
    params = nn.unbox(jax.jit(lambda: random_parameters(MODEL, jax.random.key(3)))())
    save_vision_folder(folder / "vision", MODEL.vision, params["vision"], "float32")
    save_language_folder(folder / "language", MODEL.language, params["language"], "float32")
    return folder, params


def experiment(folder, model=MODEL, seed=0):
    names = BackbonesConfig(str(folder / "vision"), str(folder / "language"))
    return ExperimentConfig(seed=seed, model=model, backbones=names)


def test_backbones_are_loaded_and_w2_is_the_lm_head(backbones):
    folder, saved = backbones
    params = initial_parameters(experiment(folder))
    for part in ("vision", "language"):
        jax.tree.map(np.testing.assert_array_equal, params[part], saved[part])
    np.testing.assert_array_equal(params["connector"]["w2"], saved["language"]["embedding"])
    assert params["connector"]["w2"] is not params["language"]["embedding"]


def test_the_seed_affects_the_connector_only(backbones):
    folder, _ = backbones
    for connector in (MODEL.connector, MLPConfig()):
        model = AlignVLMConfig(MODEL.vision, connector, MODEL.language)
        first, same_seed, other_seed = (initial_parameters(experiment(folder, model, seed)) for seed in (0, 0, 1))
        jax.tree.map(np.testing.assert_array_equal, first, same_seed)
        jax.tree.map(np.testing.assert_array_equal, first["language"], other_seed["language"])
        kernel = "w1" if connector is MODEL.connector else "linear_in"
        assert (first["connector"][kernel]["kernel"] != other_seed["connector"][kernel]["kernel"]).any()


def test_a_backbone_of_another_shape_is_refused(backbones):
    folder, _ = backbones
    vision = dataclasses.replace(MODEL.vision, num_layers=3, hidden_size=32)
    with pytest.raises(UserError, match=r"config\.model\.vision .*hidden_size 32 \(the folder says 16\), num_layers 3"):
        initial_parameters(experiment(folder, dataclasses.replace(MODEL, vision=vision)))


def test_the_config_chooses_dtype_and_remat_of_a_backbone(backbones):
    folder, _ = backbones
    language = dataclasses.replace(MODEL.language, dtype="bfloat16", remat="full", head_dim=8)
    # It must not raise: the folder says nothing about these fields, and 8 is its head width by division.
    initial_parameters(experiment(folder, dataclasses.replace(MODEL, language=language)))


def test_weights_are_loaded_onto_the_mesh_of_the_run(backbones):
    folder, saved = backbones
    config = dataclasses.replace(experiment(folder), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    params = initial_parameters(config)
    shardings = parameter_shardings(parameter_shapes(MODEL), make_mesh(config.mesh))
    jax.tree.map(lambda leaf, expected: leaf.sharding == expected or pytest.fail(str(expected)), params, shardings)
    gate = params["language"]["layers"]["mlp"]["gate"]["kernel"]
    assert gate.addressable_shards[0].data.size == gate.size // 4
    jax.tree.map(np.testing.assert_array_equal, params["language"], saved["language"])


def test_random_backbones_need_no_folder(backbones):
    folder, saved = backbones
    config = dataclasses.replace(experiment(folder), backbones=BackbonesConfig("random", str(folder / "language")))
    params = initial_parameters(config)
    jax.tree.map(np.testing.assert_array_equal, params["language"], saved["language"])
    assert (params["vision"]["position_embedding"] != saved["vision"]["position_embedding"]).any()
    both = dataclasses.replace(experiment(folder), backbones=BackbonesConfig("random", "random"))
    assert initial_parameters(both)["language"]["embedding"].shape == saved["language"]["embedding"].shape
    language = dataclasses.replace(MODEL.language, vocab_size=512)
    assert load_tokenizer(dataclasses.replace(both, model=dataclasses.replace(MODEL, language=language))).image_id == 3


def test_a_tokenizer_without_an_image_token_gets_one(tmp_path):
    """The tokenizer uses all 512 rows of its model, so the image token needs more rows; they come in blocks of 64."""
    nano = backbone_folder("language", "nano")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text((nano / name).read_text().replace("<|image|>", "<|other|>"))
    path = tmp_path / "tokenizer_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in raw.items() if "<|other|>" not in json.dumps(value)}))
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}[assistant]{% endif %}")

    def load(rows):
        language = dataclasses.replace(MODEL.language, vocab_size=rows)
        model = dataclasses.replace(MODEL, language=language)
        return load_tokenizer(ExperimentConfig(model=model, tokenizer=str(tmp_path)))

    assert load(576).image_id == 512
    with pytest.raises(UserError, match=r"needs 576 rows, the config has 512.*connector\.vocab_size to 512"):
        load(512)


@pytest.mark.parametrize("connector", connector_names())
def test_every_connector_starts_from_a_checkpoint(tmp_path, connector):
    config = exported.tiny_config(connector)
    params = exported.random_params(config.model)
    write_checkpoint(tmp_path / "before", config, params, exported.nano_tokenizer(), history=[])
    started = initial_parameters(
        dataclasses.replace(config, init_from=str(tmp_path / "before")), make_mesh(MeshConfig())
    )
    jax.tree.map(np.testing.assert_array_equal, started, params)


def test_a_missing_backbone_is_named(backbones, tmp_path):
    shutil.copytree(backbones[0] / "vision", tmp_path / "vision")
    with pytest.raises(UserError, match=f"{tmp_path}/language is not a language backbone"):
        initial_parameters(experiment(tmp_path))


def test_the_train_step_imports_no_data_libraries():
    program = (
        "import sys, alignvlm_jax.training.train_step; "
        "print(*{'grain', 'tensorflow_datasets', 'ml_collections', 'tokenizers', 'PIL'} & set(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == ""


@pytest.mark.parametrize("name", ["nano", str(NANO_MODEL)])
def test_an_exported_folder_must_be_imported_before_training(name):
    command = f"`alignvlm import --folder {NANO_MODEL} --out NEW`"
    with pytest.raises(UserError, match=f"{name} is an exported folder.*: {command}"):
        initial_parameters(ExperimentConfig(init_from=name))
