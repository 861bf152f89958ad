"""configs/finetune.py: a data set, a start and a number of steps are enough for a run."""

import json
import shutil

import PIL.Image
import pytest

from alignvlm_jax import cli
from alignvlm_jax.checkpoints.weights import write_checkpoint
from alignvlm_jax.checkpoints.workdir import read_run_config
from alignvlm_jax.config import load_config, read_config_file
from alignvlm_jax.errors import UserError
from tests.interop import exported


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny checkpoint, and its config."""
    folder, config = tmp_path_factory.mktemp("start") / "start", exported.tiny_config()
    write_checkpoint(folder, config, exported.random_params(config.model), exported.nano_tokenizer(), history=[])
    return folder, config


def test_parameters_and_overrides_set_the_run(start):
    folder, source = start
    overrides = [f"init_from={folder}", "dataset=data/tags"]
    config = load_config("configs/finetune.py", overrides)
    (stage,) = config.stages
    assert (config.data.root, stage.mixture[0].dataset, stage.mixture[0].split) == ("data", "tags", "train[:95%]")
    assert (config.evaluation.dataset, config.evaluation.split, config.evaluation.every_steps) == (
        "tags",
        "train[95%:]",
        60,
    )
    assert stage.steps == 300 and stage.warmup_steps == 30
    assert config.model.vision.num_layers == source.model.vision.num_layers
    assert config.model.connector == source.model.connector and config.data.tiling == source.data.tiling
    assert config.data.packing.tokens_per_bin == source.data.packing.tokens_per_bin

    changes = ["steps=2", "split=pages", "held_out=0", "stages.0.trainable=connector", "dataset=tags"]
    config = load_config("configs/finetune.py", [*overrides, *changes])
    (stage,) = config.stages
    assert (config.data.root, stage.mixture[0].split, stage.trainable) == (".", "pages", ("connector",))
    assert (stage.steps, stage.warmup_steps, config.evaluation.every_steps) == (2, 0, None)
    with pytest.raises(UserError, match=r"config\.held_out: expected 0 with a part of a split"):
        load_config("configs/finetune.py", [*overrides, "split=train[:50%]"])
    with pytest.raises(UserError, match=r"config\.dataset: .*finetune\.py needs a value: --config\.dataset=VALUE"):
        load_config("configs/finetune.py", overrides[:1])
    assert read_config_file("configs/finetune.py", init_from="start", dataset="data/tags").data.root == "data"


@pytest.mark.large
def test_one_command_tunes_a_prepared_data_set_and_resumes(start, tmp_path, capsys):
    """The config of the run is complete, so the checkpoint that it started from is not needed to use the run."""
    folder, source = start
    start_copy, workdir, scores = tmp_path / "start", tmp_path / "run", tmp_path / "scores.json"
    shutil.copytree(folder, start_copy)
    records = [conversation(number) for number in range(20)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for number in range(20):
        PIL.Image.new("RGB", (16, 16), (12 * number, 0, 0)).save(tmp_path / f"{number}.png")
    data = str(tmp_path / "data" / "pages")
    prepare = ["prepare", "--format", "llava", "--input", str(tmp_path / "pages.jsonl"), "--out", data]
    train = ["train", "--config", "configs/finetune.py", "--workdir", str(workdir), "--init-from", str(start_copy)]
    train += [f"--config.dataset={data}", "--config.batch=8", "--config.evaluation.limit=1"]
    assert cli.main([*prepare, "--processes", "1"]) == 0
    assert cli.main([*train, "--config.steps=1"]) == 0
    config = read_run_config(workdir)
    assert config.model.connector == source.model.connector and config.init_from == str(start_copy)
    assert set(json.loads((workdir / "config.json").read_text())["model"]["language"]) >= {"num_layers", "rope_theta"}

    # The same run resumes with one more step, and is scored, without more than its own folder.
    more = ["--config.steps=2", "--allow-config-change", "stages"]
    assert cli.main([*train, *more]) == 0
    assert "trained 2 steps" in capsys.readouterr().out
    shutil.rmtree(start_copy)
    arguments = ["--split", "train[95%:]", "--metric", "exact,anls", "--json", str(scores)]
    assert cli.main(["eval", "--checkpoint", str(workdir), *arguments]) == 0
    assert json.loads(scores.read_text())["metrics"]["anls"]["count"] == 1


def conversation(number: int) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": str(number)}]
    return {"id": str(number), "image": f"{number}.png", "conversations": turns}
