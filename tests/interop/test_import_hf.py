"""`alignvlm import` makes a checkpoint for inference, training and export from two folders."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import PIL.Image
import pytest

import alignvlm_jax
from alignvlm_jax import cli
from alignvlm_jax.backbones import backbone_folder
from alignvlm_jax.checkpoints import weights
from alignvlm_jax.checkpoints.workdir import read_run_config
from alignvlm_jax.config import load_config
from alignvlm_jax.config.experiment import BackbonesConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop import export
from alignvlm_jax.interop.import_hf import import_huggingface
from alignvlm_jax.models.alignvlm import tokens_per_tile
from alignvlm_jax.models.connectors import AlignConfig, MLPConfig
from alignvlm_jax.parallel.mesh import MeshConfig
from alignvlm_jax.training.initial import initial_parameters, load_tokenizer
from tests.interop import oracle

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_text_tokenizer(folder):
    """Writes the nano tokenizer without an image token, as the folder of a language model has it."""
    nano = backbone_folder("language", "nano")
    vocabulary = json.loads((nano / "tokenizer.json").read_text())
    names = json.loads((nano / "tokenizer_config.json").read_text())
    text = json.dumps(vocabulary).replace("<|image|>", "<|other|>")
    (folder / "tokenizer.json").write_text(text)
    config = {"eos_token": names["eos_token"], "bos_token": names.get("bos_token", names["eos_token"])}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """A tiny SigLIP, and a tiny Llama whose vocabulary is full, so that an image token needs a new row."""
    folder = tmp_path_factory.mktemp("backbones")
    oracle.siglip(folder / "vision")
    llama = oracle.llama(
        folder / "language", vocab_size=512, max_position_embeddings=400, save={"max_shard_size": "60KB"}
    )
    write_text_tokenizer(folder / "language")
    return folder, llama


@pytest.fixture(scope="module")
def imported(backbones, tmp_path_factory):
    """The imported checkpoint, its config, and the lines logged during the import."""
    folder, _ = backbones
    out, lines = tmp_path_factory.mktemp("imported") / "start", []
    config = import_huggingface(folder / "vision", folder / "language", out, connector="align", log=lines.append)
    return out, config, lines


def test_the_config_is_derived_from_the_folders(backbones, imported):
    out, config, lines = imported
    assert read_run_config(out) == config
    assert config.model.language.vocab_size == 576 and config.model.connector == AlignConfig(vocab_size=512)
    assert any("512 to 576 rows" in line for line in lines)
    # The paper's nine tiles and a thumbnail, 9 tokens each, fit into 400 positions together with 256 of text.
    tiling, packing = config.data.tiling, config.data.packing
    assert tokens_per_tile(config.model) == 9
    assert (tiling.tile_size, tiling.max_tiles, tiling.thumbnail) == (20, 9, True)
    # 10 * 9 visual tokens and 2048 of text, rounded up to a multiple of 512.
    assert (packing.tiles_per_bin, packing.tokens_per_bin) == (10, 2560)
    assert [stage.name for stage in config.stages] == [stage.name for stage in load_config("alignvlm_1b.py").stages]
    assert any("alignvlm_1b.py" in line for line in lines)


def test_weights_are_copied_from_the_folders(backbones, imported):
    (_, llama), (out, _, _) = backbones, imported
    params = weights.restore_params(out)
    table = llama.model.embed_tokens.weight.detach().numpy()
    np.testing.assert_array_equal(params["language"]["embedding"][:512], table)
    np.testing.assert_array_equal(params["connector"]["w2"], table)
    gates = [layer.mlp.gate_proj.weight.detach().numpy().T for layer in llama.model.layers]
    np.testing.assert_array_equal(params["language"]["layers"]["mlp"]["gate"]["kernel"], np.stack(gates))


def test_the_checkpoint_answers_questions(imported):
    page = PIL.Image.new("RGB", (50, 30), "white")
    assert isinstance(alignvlm_jax.load(imported[0]).ask(page, "Total?", max_new_tokens=2), str)


def test_training_starts_from_the_checkpoint(imported):
    out, config, _ = imported
    config = dataclasses.replace(config, init_from=str(out), backbones=BackbonesConfig("gone", "gone"))
    params = initial_parameters(config)
    jax.tree.map(np.testing.assert_array_equal, params, weights.restore_params(out))
    assert load_tokenizer(config).image_id == 512


def test_the_checkpoint_can_be_exported(imported, tmp_path):
    export.export_alignvlm(imported[0], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_token_id"] == 512
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Imported" in card and "`language`" in card


def copy_with_context(backbones, folder, positions):
    """Copies the backbones and changes `max_position_embeddings`; returns their folders."""
    shutil.copytree(backbones[0], folder)
    path = folder / "language" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": positions}))
    return folder / "vision", folder / "language"


def test_import_options_are_applied_and_a_short_context_limits_tiles(backbones, tmp_path):
    vision, language = copy_with_context(backbones, tmp_path / "short", 300)
    mesh, lines, out = MeshConfig(data=2, fsdp=2, tensor=2), [], tmp_path / "out"
    config = import_huggingface(vision, language, out, connector="mlp", dtype="bfloat16", mesh=mesh, log=lines.append)
    assert config.model.connector == MLPConfig()
    # 300 positions, less 256 for text, hold four tiles of 9 tokens: three and the thumbnail.
    assert config.data.tiling.max_tiles == 3
    assert "at most 3 tiles per page instead of 9: the context has 300 positions" in lines
    reader = weights.ParameterReader(out)
    assert {str(dtype) for dtype in reader.dtypes.values()} == {"bfloat16"}
    names = {"vision": "vision", "language": "language", "connector": "fresh, seed 0"}
    assert reader.history == [{"what": "imported", **names, "dtype": "bfloat16"}]


def test_a_context_without_room_for_a_tile_is_refused(backbones, tmp_path):
    vision, language = copy_with_context(backbones, tmp_path / "short", 260)
    with pytest.raises(UserError, match="a tile takes 9 positions, and the language model has 260"):
        import_huggingface(vision, language, tmp_path / "out", log=str)


def test_the_shipped_config_of_the_same_shape_is_used(tmp_path, capsys):
    arguments = ["--vision", "nano", "--language", "nano", "--out", str(tmp_path / "out"), "--max-tiles", "3"]
    assert cli.main(["import", *arguments]) == 0
    config, nano = read_run_config(tmp_path / "out"), load_config("nano.py")
    assert config.stages == nano.stages and config.model == nano.model
    assert config.data.tiling == dataclasses.replace(nano.data.tiling, max_tiles=3)
    assert "up to 3 tiles of 80 px" in capsys.readouterr().out
    params = weights.restore_params(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, params, initial_parameters(nano))


def test_the_printed_command_takes_the_grown_table_from_the_checkpoint(backbones, tmp_path, capsys):
    folder, _ = backbones
    out, file = tmp_path / "out", tmp_path / "partial.py"
    folders = ["--vision", str(folder / "vision"), "--language", str(folder / "language")]
    assert cli.main(["import", *folders, "--out", str(out)]) == 0
    assert f"--init-from {out}\n" in capsys.readouterr().out
    file.write_text(
        "def get_config():\n    return dict(stages=[dict(name='s', mixture=[dict(dataset='d')], steps=1)])\n"
    )
    model = load_config(file, [f"init_from={out}"]).model
    assert model.language.vocab_size == 576 and model.connector == AlignConfig(vocab_size=512)


def test_the_folders_tell_the_shape_of_a_partial_config(backbones, tmp_path):
    """The backbones that the config names are others, and not on this machine."""
    folder, _ = backbones
    file = tmp_path / "partial.py"
    file.write_text(
        "from alignvlm_jax.config import read_config_file\n\n\n"
        "def get_config():\n    config = read_config_file('alignvlm_8b.py')\n"
        "    config.backbones.language = 'gone'\n    return config\n"
    )
    config = import_huggingface(folder / "vision", folder / "language", tmp_path / "out", config_file=file, log=str)
    assert (config.model.language.hidden_size, config.model.vision.image_size) == (32, 20)
    assert config.model.language.remat == "full" and config.data.tiling.tile_size == 20


def truncate_weights(folder):
    path = next((folder / "language").glob("model-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-50])


def point_index_outside(folder):
    path = folder / "language" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "x": "../../etc/model.safetensors"}}))


def break_tokenizer(folder):
    """Adds a token whose id has no row in the embedding table."""
    path = folder / "language" / "tokenizer.json"
    path.write_text(
        path.read_text().replace(
            '"added_tokens": [',
            '"added_tokens": [{"id": 600, "content": "<x>", '
            '"single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}, ',
        )
    )


def break_both(folder):
    truncate_weights(folder)
    (folder / "vision" / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_weights, r"model-.* is damaged, truncated"),
        (point_index_outside, "points outside the folder"),
        (break_tokenizer, "the embedding table has 512 rows"),
        (break_both, r"vision: no weights.*is damaged"),
    ],
)
def test_bad_folders_leave_nothing_behind(backbones, tmp_path, damage, message):
    shutil.copytree(backbones[0], tmp_path / "damaged")
    damage(tmp_path / "damaged")
    out = tmp_path / "parent" / "out"
    with pytest.raises(UserError, match=message):
        import_huggingface(tmp_path / "damaged" / "vision", tmp_path / "damaged" / "language", out, log=str)
    assert list((tmp_path / "parent").iterdir()) == []


def test_bad_arguments_are_refused(backbones, tmp_path, capsys):
    folder, _ = backbones
    required = ["--vision", str(folder / "vision"), "--language", str(folder / "language")]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    for arguments, message in (
        (["--out", str(tmp_path / "taken")], "exists already"),
        (["--out", str(tmp_path / "out"), "--connector", "alin"], "expected one of align, mlp,"),
        (["--out", str(tmp_path / "out"), "--config", "nano.py"], r"config\.model\.vision is not the model in"),
        (["--out", str(tmp_path / "out"), "--chat-template", "gone.jinja"], "gone.jinja: cannot be read"),
        (["--out", str(tmp_path / "out"), "--mesh", "data=2,model=4"], "such as data=1"),
        (["--out", str(tmp_path / "out"), "--mesh", "data=3"], "does not fit 8 device"),
    ):
        assert cli.main(["import", *required, *arguments]) == 2
        assert re.search(message, capsys.readouterr().err), message
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
