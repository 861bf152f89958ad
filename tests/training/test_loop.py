"""The training loop from end to end: the order of stages, the files it writes, and exact resumption."""

import dataclasses
import json
import os
import shutil
import signal

import flax.linen as nn
import jax
import numpy as np
import pytest

from alignvlm_jax.checkpoints import weights
from alignvlm_jax.checkpoints.checkpointer import Checkpointer
from alignvlm_jax.checkpoints.workdir import Progress, find_checkpoint, read_meta, read_run_config
from alignvlm_jax.config.experiment import ExperimentConfig
from alignvlm_jax.config.run import CheckpointConfig, ProfileConfig
from alignvlm_jax.config.serialization import config_to_dict
from alignvlm_jax.data.packing import PackingConfig, Refused
from alignvlm_jax.data.pipeline import DataConfig
from alignvlm_jax.data.planning import StagePlan
from alignvlm_jax.data.tiling import TilingConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.leases.lease import InUseError, LeaseLostError
from alignvlm_jax.leases.one_writer import one_writer
from alignvlm_jax.models.alignvlm import random_parameters
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training import config_changes, loop
from alignvlm_jax.training.resumption import Resumption
from alignvlm_jax.training.train_step import abstract_state
from tests.training.batches import MODEL, random_batch, stage

# Two short stages, so that runs can be stopped in either, between them, and between checkpoints.
CONFIG = ExperimentConfig(
    model=dataclasses.replace(MODEL, language=dataclasses.replace(MODEL.language, remat="auto")),
    data=DataConfig(tiling=TilingConfig(tile_size=16), packing=PackingConfig(64, 3, 8)),
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    stages=(
        stage(name="first", steps=4),
        stage(name="second", steps=None, epochs=1.5, trainable=("connector", "language")),
    ),
    checkpoint=CheckpointConfig(every_steps=3, keep=10),
    log_every_steps=2,
)
TOTAL = 4 + 3  # steps of both stages; `RandomData.plan` makes 3 of 1.5 epochs


class RandomBatches:
    """A `BatchIterator` whose batches depend on the stage and the step."""

    def __init__(self, stage_index, step, rows):
        self._stage_index, self._step, self._rows, self._last = stage_index, step, list(rows), []

    def __iter__(self):
        return self

    def __next__(self):
        batch = random_batch(1000 * self._stage_index + self._step)
        batch |= {"example_ids": np.zeros((1, 8, 4), np.int32), "num_refused": np.ones((1, 8), np.int32)}
        self._step += 1
        self._last = [Refused(f"{self._step}", "documents", "random")]
        return {name: field[:, self._rows] for name, field in batch.items()}

    def state(self):
        return {str(row): {"next": self._step} for row in self._rows}

    def refused(self):
        return self._last

    def name(self, number):
        return f"page-{number}"

    def close(self):
        self._rows = None


class RandomData:
    """Provides random data in place of the data sets of a config."""

    def __init__(self, config):
        del config

    def plan(self, stage_index, stage_config):
        return StagePlan(stage_config.steps or round(2 * stage_config.epochs), 1, 2.0)

    def batches(self, stage_index, stage_config, plan, state, rows):
        assert stage_config.bins_per_step == 8 and plan.steps == stage_config.steps
        steps = {state[str(row)]["next"] for row in rows} if state else {0}
        return RandomBatches(stage_index, *steps, rows)

    def page_scale(self):
        return None

    def save_tokenizer(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text("{}")


def make_params(config):
    return nn.unbox(jax.jit(lambda: random_parameters(config.model, jax.random.key(config.seed)))())


def train(workdir, config=CONFIG, **options):
    return loop.train(config, workdir, open_data=RandomData, make_params=make_params, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: its workdir, its result, and the (index, initial weights) of each stage."""
    workdir, stage_starts = tmp_path_factory.mktemp("finished"), []
    result = train(workdir, on_stage_start=lambda index, params: stage_starts.append((index, jax.device_get(params))))
    return workdir, result, stage_starts


def test_stages_run_in_order_and_freeze_the_configured_parts(finished):
    _, result, stage_starts = finished
    assert [index for index, _ in stage_starts] == [0, 1]
    assert result.progress.step == TOTAL and result.progress.stage == 2 and result.progress.train_seconds > 0
    # The second stage trains the connector and the decoder only.
    before, after = stage_starts[1][1], jax.device_get(result.params)
    jax.tree.map(np.testing.assert_array_equal, before["vision"], after["vision"])
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), before["language"], after["language"])))


def test_the_workdir_is_complete(finished):
    workdir, result, _ = finished
    assert find_checkpoint(workdir) == (workdir, TOTAL)
    assert read_run_config(workdir) == CONFIG
    assert (workdir / "tokenizer" / "tokenizer.json").is_file()
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert steps == [3, 4, 6, 7]  # Every third step, and the end of each stage.
    meta = json.loads((workdir / "checkpoints" / "4" / "meta" / "metadata").read_text())
    assert meta["progress"]["step_in_stage"] == 4 and "jax" in meta["versions"]
    assert meta["data"]["rows"] == {str(row): {"next": 4} for row in range(8)}
    assert [plan["steps"] for plan in meta["data"]["plans"]] == [4, 3]
    refused = [json.loads(line)["id"] for line in (workdir / "data_refused.jsonl").read_text().splitlines()]
    assert refused == ["1", "2", "3", "4"], "each refused record is named once"
    assert meta["config"] == json.loads((workdir / "config.json").read_text())
    # remat="auto": the choice of each stage. The machine has memory for a tiny model without recomputation.
    choices = json.loads((workdir / "remat.json").read_text())
    assert {name: choice["language"] for name, choice in choices.items()} == {"first": "none", "second": "none"}


def test_event_files_contain_the_metrics(finished):
    workdir, _, _ = finished
    (events,) = (workdir / "tensorboard").iterdir()
    recorded = events.read_bytes()
    for name in ("loss", "grad_norm", "token_fraction", "tokens_per_second", "tiles_per_second", "effective_tokens"):
        assert f"train/{name}".encode() in recorded
    assert b"learning_rate/connector" in recorded and b"train/refused" in recorded and b"train/data_wait" in recorded
    assert b"train/tflops_per_second_per_chip" in recorded and b"train/tiles_per_second_per_chip" in recorded
    assert b"train/mfu" not in recorded, "the peak of a CPU is not known"


def test_an_interrupted_run_ends_with_the_same_weights(finished, tmp_path):
    for stop in (1, 4, 6):  # In stage 1, between the stages, and in stage 2.
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, on_step=lambda step, stop=stop: step == stop and os.kill(os.getpid(), signal.SIGTERM))
        assert find_checkpoint(tmp_path)[1] == stop
    result = train(tmp_path, dataclasses.replace(CONFIG, profile=ProfileConfig(steps="7:8")))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(result.params), jax.device_get(finished[1].params))
    # The last session was profiled, which must not change the weights either.
    (trace,) = (tmp_path / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert b"train_step" in trace.read_bytes()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the previous signal handlers are restored"


def test_a_run_resumed_from_the_middle_of_a_stage_ends_with_the_same_weights(finished, tmp_path):
    workdir, result, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    # Only step 3 is left, which was saved in the middle of stage 1.
    for step in (4, 6, 7):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    resumed = train(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.params), jax.device_get(result.params))


def test_a_finished_run_is_not_trained_again(finished):
    workdir, result, _ = finished
    rerun = train(workdir, on_step=lambda step: pytest.fail("no step should be left"))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(rerun.params), jax.device_get(result.params))
    assert rerun.progress == result.progress


def test_a_run_is_not_resumed_with_a_changed_config(finished):
    workdir, _, _ = finished
    stages = (dataclasses.replace(CONFIG.stages[0], global_batch=16), CONFIG.stages[1])
    changed = dataclasses.replace(CONFIG, stages=stages)
    with pytest.raises(UserError, match=r"stages\.0\.global_batch: 8 before, 16 now.*choose another workdir.*"):
        train(workdir, changed)
    changes = config_changes.compare(config_to_dict(CONFIG), changed)
    assert config_changes.describe(changes) == "the config has changed:\n  stages.0.global_batch: 8 before, 16 now"
    config_changes.check(changes, ["stages.0.global_batch"], workdir)
    config_changes.check(changes, ["stages"], workdir)
    with pytest.raises(UserError, match="--allow-config-change stages.0.global_batch$"):
        config_changes.check(changes, ["seed", "stages.0.global"], workdir)
    faster = dataclasses.replace(CONFIG, mesh=dataclasses.replace(CONFIG.mesh, gradient_dtype="bfloat16"))
    changes = config_changes.compare(config_to_dict(CONFIG), faster)
    config_changes.check(changes, [], workdir)
    assert "mesh.gradient_dtype: 'float32' before, 'bfloat16' now" in config_changes.describe(changes)
    old_config = config_to_dict(CONFIG)
    del old_config["anomalies"]
    assert not config_changes.compare(old_config, CONFIG), "a missing key has its default"
    # These two fields do not change the result, so changing them is allowed.
    train(workdir, dataclasses.replace(CONFIG, log_every_steps=5, mesh=MeshConfig()))


def test_a_change_of_stages_makes_new_plans(finished, tmp_path):
    """A run stopped in stage 1 is resumed with a longer stage 2: stage 1 continues as planned, stage 2 is replanned."""
    workdir, _, stage_starts = finished
    shutil.copytree(workdir, tmp_path / "run")
    for step in (4, 6, 7):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    longer = dataclasses.replace(CONFIG, stages=(CONFIG.stages[0], dataclasses.replace(CONFIG.stages[1], epochs=2.5)))
    with pytest.raises(UserError, match=r"--allow-config-change stages\.1\.epochs$"):
        train(tmp_path / "run", longer)
    resumed_stage_starts = []
    result = train(
        tmp_path / "run",
        longer,
        allow_config_change=["stages.1.epochs"],
        on_stage_start=lambda index, params: resumed_stage_starts.append((index, jax.device_get(params))),
    )
    assert result.progress.step == 4 + 5
    meta = read_meta(tmp_path / "run" / "checkpoints" / "9")
    assert [plan["steps"] for plan in meta["data"]["plans"]] == [4, 5]
    assert [index for index, _ in resumed_stage_starts] == [0, 1]
    # Stage 1 ended with the same weights as without the change.
    jax.tree.map(np.testing.assert_array_equal, resumed_stage_starts[1][1], stage_starts[1][1])


def test_an_allowed_change_survives_a_kill_before_the_next_checkpoint(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "7")
    longer = dataclasses.replace(CONFIG, stages=(CONFIG.stages[0], dataclasses.replace(CONFIG.stages[1], epochs=2.5)))

    def kill(step):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path / "run", longer, allow_config_change=["stages.1.epochs"], on_step=kill)
    # The change was recorded before the kill, so it need not be allowed rerun.
    assert train(tmp_path / "run", longer).progress.step == 4 + 5


def test_a_lost_config_does_not_allow_changes(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError, match="--allow-config-change seed$"):
        train(tmp_path / "run", dataclasses.replace(CONFIG, seed=7))
    assert train(tmp_path / "run").progress.step == TOTAL
    assert read_run_config(tmp_path / "run") == CONFIG
    assert "checkpoints: at most" in capsys.readouterr().out, "the budget is printed before the first step"


def test_a_resumed_run_keeps_its_grouping_of_questions(finished, capsys):
    """The position of the run in its data counts groups."""
    packing = dataclasses.replace(CONFIG.data.packing, branch_tokens_per_bin=32)
    data = dataclasses.replace(CONFIG.data, group_questions="tree", packing=packing)
    changed = dataclasses.replace(CONFIG, data=data)
    train(finished[0], changed, on_step=lambda step: pytest.fail("no step is left"))
    assert read_run_config(finished[0]).data == CONFIG.data
    assert "the run keeps config.data.group_questions=off, which it began with, and ignores 'tree'" in (
        capsys.readouterr().out
    )


def test_weights_are_restored_on_one_device_and_on_any_mesh(finished):
    workdir, result, _ = finished
    expected = jax.device_get(result.params)
    single = weights.restore_params(workdir)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(single), expected)
    assert all(leaf.sharding.device_set == {jax.devices()[0]} for leaf in jax.tree.leaves(single))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    sharded = weights.restore_params(workdir / "checkpoints" / str(TOTAL), mesh)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(sharded), expected)
    assert sharded["language"]["embedding"].addressable_shards[0].data.shape == (24, 4)


def test_optimizer_state_is_restored_on_another_mesh(finished):
    workdir, _, _ = finished
    progress = Progress(step=3, stage=0, step_in_stage=3)
    states = []
    with Checkpointer(workdir, CONFIG) as checkpointer:
        for mesh in (MeshConfig(2, 2, 2), MeshConfig(4, 1, 2), MeshConfig(8, 1, 1)):
            abstract = abstract_state(MODEL, CONFIG.stages[0], make_mesh(mesh))
            resumption = Resumption(CONFIG, CONFIG.stages, make_mesh(mesh), checkpointer, make_params)
            state = resumption.make_state(progress, params=None)
            states.append((state.step, state.params, state.opt_state))
            expected_leaves = jax.tree.leaves((abstract.step, abstract.params, abstract.opt_state))
            for leaf, expected in zip(jax.tree.leaves(states[-1]), expected_leaves, strict=True):
                assert leaf.sharding == expected.sharding and leaf.shape == expected.shape
    first, *others = map(jax.device_get, states)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, 'no such folder; a checkpoint is .*workdir.* exported folder.* "nano"'),
        (lambda folder: folder.mkdir(), "is not a checkpoint"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{}")), "holds no finished checkpoint"),
        (lambda folder: folder.write_text("x"), "a file, not a folder"),
    ],
)
def test_a_folder_that_is_not_a_checkpoint_is_reported_in_one_line(tmp_path, make, message):
    make(tmp_path / "run")
    with pytest.raises(UserError, match=message) as error:
        weights.restore_params(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_out_of_memory_in_a_step_is_explained_and_profiled(finished, tmp_path):
    def allocate_too_much(step):
        del step
        jax.numpy.zeros((2**45,), np.int8).block_until_ready()

    with pytest.raises(UserError, match="out of memory: 32768.00 GiB were requested .* try fewer config.data.packing"):
        train(tmp_path, on_step=allocate_too_much)
    assert (tmp_path / "out_of_memory.prof").stat().st_size > 100


def test_bins_that_do_not_divide_over_the_mesh_are_refused(tmp_path):
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, packing=PackingConfig(64, 3, 6)))
    with pytest.raises(UserError, match="bins_per_microbatch: expected a multiple of 4"):
        train(tmp_path, config)


def test_a_mesh_that_does_not_use_all_devices_is_refused(tmp_path):
    with pytest.raises(UserError, match="data=3 fsdp=1 tensor=1 does not fit 8"):
        train(tmp_path, dataclasses.replace(CONFIG, mesh=MeshConfig(data=3)))


def test_a_second_run_in_a_workdir_is_refused_before_it_reads_or_deletes_anything(tmp_path):
    """meta-pytorch/torchtune#481 and deepinv/deepinv#525."""
    remains = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    remains.mkdir(parents=True)
    (tmp_path / "config.json").write_text("not read")
    with one_writer(tmp_path), pytest.raises(InUseError, match="another run is writing to it: host"):
        train(tmp_path)
    assert remains.is_dir() and (tmp_path / "config.json").read_text() == "not read"


def test_a_run_ends_at_the_step_after_it_lost_its_lease():
    class Lost:
        def raise_if_lost(self):
            raise LeaseLostError

    with pytest.raises(LeaseLostError):
        loop._finish_step(Lost(), pytest.fail, 3)
