"""A run records the commits of its models on the Hub, and a resumed run uses the same ones."""

import dataclasses
import json

import pytest

from alignvlm_jax.backbones import backbone_folder
from alignvlm_jax.config.experiment import BackbonesConfig, ExperimentConfig
from alignvlm_jax.config.serialization import config_to_json
from alignvlm_jax.errors import UserError
from alignvlm_jax.training.initial import load_tokenizer
from alignvlm_jax.training.pinning import pin_sources
from tests.hub_server import forget

NANO = {path.name: path.read_bytes() for path in backbone_folder("language", "nano").iterdir()}
NAME = "org/llama"


def test_a_resumed_run_keeps_its_commit(hub, tmp_path):
    first = hub.add(NAME, NANO)
    config = ExperimentConfig(backbones=BackbonesConfig("nano", NAME))
    pinned = pin_sources(config, tmp_path)
    assert pinned.backbones == BackbonesConfig("nano", f"{NAME}@{first}")
    assert pin_sources(pinned, tmp_path) is pinned
    (tmp_path / "config.json").write_text(config_to_json(pinned))
    # The model changes. The run does not, whether or not the Hub answers.
    second = hub.add(NAME, NANO | {"generation_config.json": b"{}"})
    forget()
    assert pin_sources(config, tmp_path) == pinned
    assert pin_sources(config, tmp_path / "new").backbones.language == f"{NAME}@{second}"
    # A revision that is named is looked up.
    named = dataclasses.replace(config, backbones=BackbonesConfig("nano", f"{NAME}@main"))
    assert pin_sources(named, tmp_path).backbones.language == f"{NAME}@{second}"


def test_the_tokenizer_of_the_commit_is_loaded_without_weights(hub, tmp_path):
    hub.add(NAME, NANO)
    config = ExperimentConfig(tokenizer=NAME)
    pinned = pin_sources(config, tmp_path)
    assert pinned.tokenizer.startswith(f"{NAME}@")
    vocabulary = json.loads(NANO["config.json"])["vocab_size"]
    model = dataclasses.replace(
        config.model, language=dataclasses.replace(config.model.language, vocab_size=vocabulary)
    )
    assert load_tokenizer(dataclasses.replace(pinned, model=model)).vocab_size <= vocabulary
    assert "model.safetensors" not in hub.downloads()


def test_a_model_that_does_not_exist_is_refused_before_the_run(hub, tmp_path):
    with pytest.raises(UserError, match="the Hub has no such model"):
        pin_sources(ExperimentConfig(backbones=BackbonesConfig("nano", NAME)), tmp_path)
