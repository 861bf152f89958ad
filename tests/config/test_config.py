"""Configs are checked before anything is built. An error is one line: what is wrong, where, and the likely fix."""

import dataclasses
import json
import os
import sys

import pytest

from alignvlm_jax.config import load_config, read_config_file
from alignvlm_jax.config.serialization import config_from_dict, config_hash, config_to_dict, config_to_json
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.connectors import AlignConfig, MLPConfig, PerceiverConfig, connector_named, connector_names

NANO = "configs/nano.py"


def write_config(tmp_path, text):
    path = tmp_path / "experiment.py"
    path.write_text(text)
    return path


def error_message(overrides=(), file=NANO):
    """Returns the one-line error of loading a config that must fail."""
    with pytest.raises(UserError) as error:
        load_config(file, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_nano_has_the_three_stages_of_the_paper():
    config = load_config(NANO)
    assert [stage.trainable for stage in config.stages] == [
        ("vision", "connector", "language"),
        ("vision", "connector", "language"),
        ("connector", "language"),
    ]
    assert isinstance(config.model.connector, AlignConfig)


def test_a_config_round_trips_through_json():
    config = load_config(NANO, ["model.connector.vocab_size=500", "stages.1.steps=None", "stages.1.epochs=0.5"])
    restored = config_from_dict(json.loads(config_to_json(config)))
    assert restored == config
    assert config_hash(restored) == config_hash(config) != config_hash(load_config(NANO))
    hash(config)  # It must not raise: configs are static arguments of jitted functions.


def test_overrides_are_parsed_as_the_type_of_their_field():
    config = load_config(
        NANO,
        [
            "seed=7",
            "--config.stages.0.learning_rates.vision=1e-5",
            "stages.2.trainable=connector",
            "stages.0.trainable=('vision', 'language')",
            "stages.0.name=1",
            "stages.1.optimizer.clip_norm=none",
            "data.tiling.thumbnail=true",
            "data.root=/some/where=else",
            "mesh.fsdp=2",
            "backbones.language=random:nano",  # the nano decoder has no such scaling
            "model.language.rope_scaling.factor=8",
            "model.language.remat=qkv,attention_out",
        ],
    )
    assert config.seed == 7 and config.stages[0].learning_rates.vision == 1e-5
    assert config.stages[2].trainable == ("connector",) and config.stages[0].trainable == ("vision", "language")
    assert config.stages[0].name == "1" and config.stages[1].optimizer.clip_norm is None
    assert config.data.tiling.thumbnail is True and config.data.root == "/some/where=else"
    assert config.mesh.fsdp == 2 and config.model.language.rope_scaling.factor == 8.0
    assert config.model.language.remat == "attention_out,qkv"


def test_an_override_leaves_other_fields_unchanged():
    before, after = load_config(NANO), load_config(NANO, ["stages.1.learning_rates.vision=0.5"])
    rates = dataclasses.replace(before.stages[1].learning_rates, vision=0.5)
    assert after.stages[1] == dataclasses.replace(before.stages[1], learning_rates=rates)
    assert after.stages[0] == before.stages[0]


@pytest.mark.parametrize("name", connector_names())
def test_the_connector_is_chosen_by_name(name):
    # HoneyBee's 144 tokens are more than the nano encoder's patches.
    overrides = ["model.connector.num_tokens=64"] if name == "c_abstractor" else []
    for override in (f"model.connector={name}", f"model.connector.name={name}"):
        config = load_config(NANO, [override, *overrides])
        assert type(config.model.connector) is connector_named(name).config
    assert config_to_dict(config)["model"]["connector"]["name"] == name


def test_each_connector_has_its_own_fields():
    config = load_config(NANO, ["model.connector=perceiver", "model.connector.num_latents=16"])
    assert config.model.connector == PerceiverConfig(num_latents=16)
    assert load_config(NANO, ["model.connector=mlp"]).model.connector == MLPConfig()
    assert load_config(NANO, ["model.connector.vocab_scale_init=1.5"]).model.connector.vocab_scale_init == 1.5


def test_a_removed_option_is_dropped_if_it_was_off():
    """Configs and checkpoints of earlier versions hold the key. A value that turned the option on is refused."""
    config = load_config(NANO)
    raw = config_to_dict(config)
    raw["model"]["connector"]["num_extra_words"] = 0
    assert config_from_dict(raw) == config == load_config(NANO, ["model.connector.num_extra_words=0"])
    raw["model"]["connector"]["num_extra_words"] = 3
    match = r"^config\.model\.connector\.num_extra_words: expected 0 or no such key, got the whole number 3: .*removed$"
    with pytest.raises(UserError, match=match) as refusal:
        config_from_dict(raw)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "override, expected",
    [
        # A wrong key: its full path and the closest valid one.
        ("modle.connector=mlp", ["config.modle", "did you mean 'model'?"]),
        ("stages.0.learning_rate.vision=1", ["config.stages.0.learning_rate:", "did you mean 'learning_rates'?"]),
        ("stages.0.optimizer.wieght_decay=1", ["config.stages.0.optimizer.wieght_decay", "'weight_decay'"]),
        ("stages.3.steps=1", ["config.stages.3", "3 entries: 0 to 2"]),
        ("stages.first.steps=1", ["config.stages.first", "3 entries: 0 to 2"]),
        ("model.connector.vocab_scale=1", ["config.model.connector.vocab_scale:", "'vocab_scale_init'"]),
        ("seed.x=1", ["config.seed.x", "single value"]),
        ("model.connector.num_extra_words=128", ["config.model.connector.num_extra_words", "removed", "number 128"]),
        # A wrong type: what was expected.
        ("seed=one", ["config.seed", "a whole number", "the string 'one'"]),
        ("stages.0.steps=2.5", ["config.stages.0.steps", "a whole number", "2.5"]),
        ("stages.0.steps=True", ["config.stages.0.steps", "a whole number", "True"]),
        ("data.tiling.thumbnail=1", ["config.data.tiling.thumbnail", "True or False"]),
        ("stages.0.learning_rates.vision=fast", ["config.stages.0.learning_rates.vision", "a number"]),
        ("stages.0.learning_rates=1e-3", ["config.stages.0.learning_rates", "the fields of LearningRates"]),
        ("seed", ["--config.seed=value"]),
        # A wrong value: what is allowed.
        ("model.connector=aling", ["config.model.connector.name", "did you mean 'align'?"]),
        ("model.vision.dtype=float16", ["config.model.vision.dtype", "float32, bfloat16"]),
        ("model.language.remat=ful", ["config.model.language.remat", "did you mean 'full'?"]),
        ("model.vision.remat=qkv,atention_out", ["config.model.vision.remat", "did you mean 'attention_out'?"]),
        ("model.vision.remat=qkv,full", ["config.model.vision.remat", "'full' cannot be combined"]),
        ("model.vision.remat=", ["config.model.vision.remat", "expected one of none, full, auto, attention_out"]),
        ("stages.0.optimizer.name=moun", ["config.stages.0.optimizer.name", "did you mean 'muon'?"]),
        ("stages.0.schedule=cos", ["config.stages.0.schedule", "cosine, linear, constant"]),
        ("stages.0.trainable=visoin", ["config.stages.0.trainable.0", "did you mean 'vision'?"]),
        ("stages.0.trainable=vision,vision", ["config.stages.0.trainable.1", "twice"]),
        ("stages.0.trainable=()", ["config.stages.0.trainable", "at least one"]),
        ("stages.0.mixture.0.task=read", ["config.stages.0.mixture.0.task", "transcribe, qa, mixed"]),
        ("stages.0.mixture.0.weight=-1", ["config.stages.0.mixture.0.weight", "more than 0"]),
        ("stages.0.epochs=1", ["config.stages.0", "either steps or epochs", "both"]),
        ("stages.0.steps=None", ["config.stages.0", "either steps or epochs", "neither"]),
        ("stages.0.global_batch=0", ["config.stages.0.global_batch", "more than 0"]),
        ("stages.0.warmup_steps=1000", ["config.stages.0.warmup_steps", "fewer than"]),
        ("stages.0.learning_rates.vision=nan", ["config.stages.0.learning_rates.vision", "a number"]),
        ("stages.0.learning_rates.vision=1e999", ["config.stages.0.learning_rates.vision", "0 or more"]),
        ("stages.1.name=captions", ["config.stages", "different names"]),
        ("data.tiling.rule=intern", ["config.data.tiling.rule", "ovis"]),
        (
            "model.newline=false data.tiling.rule=anyres_max_9",
            ["config.model.newline", "expected True", "anyres_max_9"],
        ),
        ("model.newline=true", ["config.model.newline", "expected False", "ovis"]),
        ("data.tiling.tile_size=84", ["config.data.tiling.tile_size", "image_size, 80", "84"]),
        ("data.packing.tokens_per_bin=0", ["config.data.packing", "tokens_per_bin"]),
        ("data.packing.window=0", ["config.data.packing", "window"]),
        ("data.workers=-1", ["config.data.workers", "0 or more"]),
        ("data.max_refused=2.0", ["config.data.max_refused", "a fraction from 0 to 1"]),
        ("stages.0.bins_per_step=6", ["config.stages.0.bins_per_step", "multiple of", "4"]),
        ("model.vision.num_heads=3", ["config.model.vision.num_heads", "hidden_size 128"]),
        ("model.language.num_kv_heads=3", ["config.model.language.num_kv_heads", "num_heads 4"]),
        ("model.vision.patch_size=100", ["config.model.vision.patch_size", "at most"]),
        ("mesh.tensor=0", ["config.mesh", "tensor=0"]),
        ("mesh.tensor=-1", ["config.mesh", "at most one"]),
        ("checkpoint.keep=0", ["config.checkpoint.keep", "more than 0"]),
    ],
)
def test_an_error_names_the_full_path(override, expected):
    message = error_message(override.split(" "))
    for part in expected:
        assert part in message


def test_a_missing_file_is_reported_with_the_shipped_configs():
    message = error_message(file="configs/nanno.py")
    assert "configs/nanno.py" in message and "nano.py" in message


def test_a_shipped_config_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/nano.py") == load_config("nano.py")
    # Only a bare name, or one in configs/, stands for a shipped config.
    with pytest.raises(UserError, match="no such config file"):
        load_config("elsewhere/nano.py")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("def get_config(:\n    pass\n", "line 1: "),
        ("x = 1\n\ndef get_config():\n    return dict(seed=1 / 0)\n", "line 4: ZeroDivisionError"),
        ("import nowhere_to_be_found\n", "line 1: ModuleNotFoundError"),
        ("config = 1\n", "must define get_config()"),
        ("def get_config():\n    return 3\n", "must return a ConfigDict"),
        ("def get_config():\n    return {}\n", "config.stages: expected at least one stage"),
        ("def get_config():\n    return dict(stages=dict(name='x'))\n", "config.stages: expected a list"),
        ("def get_config():\n    return dict(stages=[dict(name='x')])\n", "config.stages.0.mixture: missing"),
    ],
)
def test_an_invalid_file_is_named_with_the_line_or_key_of_its_error(tmp_path, text, expected):
    path = write_config(tmp_path, text)
    message = error_message(file=path)
    assert expected in message
    assert str(path) in message or message.startswith("config.")


@pytest.mark.parametrize("neighbor", ["base.py", "base/__init__.py"])
def test_a_config_file_may_import_its_neighbors(tmp_path, monkeypatch, neighbor):
    """open-mmlab/mim-example#5, facebookresearch/detectron2#4214: a config file imports a module next to it."""
    # A console script has its own folder instead of the current one on the path.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    monkeypatch.chdir(tmp_path)
    for seed in (3, 4):
        folder = tmp_path / f"project{seed}"
        (folder / neighbor).parent.mkdir(parents=True)
        (folder / neighbor).write_text(f"SEED = {seed}\n")
        (folder / "mine.py").write_text(
            "from alignvlm_jax.config import read_config_file\nfrom base import SEED\n\n"
            "def get_config():\n    config = read_config_file('nano.py')\n    config.seed = SEED\n    return config\n"
        )
        # The second folder has another module of the same name.
        assert load_config(folder / "mine.py").seed == seed
    (tmp_path / "shared_settings.py").write_text("SEED = 5\n")
    text = (tmp_path / "project3" / "mine.py").read_text()
    (tmp_path / "project3" / "mine.py").write_text(text.replace("from base", "from shared_settings"))
    assert load_config("project3/mine.py").seed == 5
    assert "base" not in sys.modules and str(tmp_path) not in sys.path


def test_a_connector_without_token_positions_cannot_join_tiles():
    overrides = ["data.tiling.rule=anyres_max_9", "model.connector=perceiver"]
    assert "have no positions in their tile" in error_message(overrides)
    # The same rule is accepted with the default connector. It needs newlines, which the config need not say.
    assert load_config(NANO, overrides[:1]).model.newline


PARAMETERS = """
from alignvlm_jax.config import read_config_file


def get_config(name: str, count: int = 2, rates: tuple[float, ...] = (1e-4,)):
    config = read_config_file("nano.py")
    config.data.root = name
    config.seed = count
    config.stages[0].learning_rates.vision = rates[0]
    return config
"""


def test_a_config_file_may_have_parameters(tmp_path):
    file = write_config(tmp_path, PARAMETERS)
    config = load_config(file, ["name=pages", "--config.count=3", "rates=(0.5,)", "log_every_steps=7"])
    assert (config.data.root, config.seed, config.stages[0].learning_rates.vision) == ("pages", 3, 0.5)
    assert config.log_every_steps == 7 and load_config(file, ["name=1"]).data.root == "1"
    assert read_config_file(file, name="pages").seed == 2
    for overrides, message in (
        ([], f"config.name: {file} needs a value: --config.name=VALUE"),
        (["name=pages", "count=many"], "config.count: expected a whole number, got the string 'many'"),
        (["name=pages", "cuont=3"], f"config.cuont: no such key: did you mean 'count'?; {file} has name, count, rates"),
        (["name=pages", "stage.0.steps=1"], "config.stage.0.steps: no such key: did you mean 'stages'?"),
        (["name=pages", "stages.0.stesp=1"], "config.stages.0.stesp: no such key: did you mean 'steps'?"),
    ):
        assert error_message(overrides, file).startswith(message)
