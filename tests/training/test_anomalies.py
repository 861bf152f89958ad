"""Anomalies: skipped updates, rollbacks with skipped data, loss spikes, and the operation that produced a NaN."""

import dataclasses
import errno
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.checkpoints import arrays
from alignvlm_jax.checkpoints.workdir import find_checkpoint, read_meta
from alignvlm_jax.config import load_config
from alignvlm_jax.config.run import AnomalyConfig, DebugConfig
from alignvlm_jax.data.packing import empty_batch
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel.mesh import MeshConfig, make_mesh
from alignvlm_jax.training import anomalies, loop
from alignvlm_jax.training.anomalies import AnomalyWatch
from alignvlm_jax.training.initial import initial_parameters
from alignvlm_jax.training.train_step import FIELDS, create_state, make_train_step
from tests.parallel import tiny
from tests.training import batches

MESH = (8, 1, 1)


def run(workdir, bad=(), stop_after=None, skip=(), bad_stage=0, mesh=MESH, **changes):
    """Trains the tiny model and saves every second step.

    Args:
      workdir: folder of the run.
      bad: numbers of the batches, counted from 1, whose loss weights are infinite.
      stop_after: step after which the run ends with an error, as if it had been killed.
      skip: numbers of the batches that are skipped.
      bad_stage: index of the stage that has the bad batches.
      mesh: sizes of the axes data, fsdp and tensor.
      **changes: changed fields of the config.

    Returns:
      The result of the run, and {step: (loss, number of refused examples)}.
    """
    config = dataclasses.replace(tiny.config(mesh), **changes)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every_steps=2))
    losses = {}
    batch_options = dict(bad_batches=bad, bad_stage=bad_stage, skip=skip)
    result = tiny.train(workdir, config, losses=losses, examples=[], **batch_options, **stop_options(stop_after))
    return result, losses


def stop_options(stop_after):
    """Returns the option of `tiny.train` that ends a run with an error after a step."""

    def on_step(step):
        if step == stop_after:
            raise RuntimeError("killed")

    return {} if stop_after is None else {"on_step": on_step}


def read_reports(workdir):
    """Returns the entries of anomalies.jsonl."""
    lines = (workdir / anomalies.ANOMALIES_FILE).read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_a_step_that_is_not_finite_changes_nothing():
    config = tiny.config(MESH)
    stage = dataclasses.replace(config.stages[0], steps=5)
    train_step = jax.jit(make_train_step(config.model, stage))
    params = tiny.make_params(config)
    state = create_state(stage, params)
    state, metrics = train_step(state, batches.random_batch(0))
    assert metrics["skipped"] == 0
    for infinite in ("loss", "gradient"):
        batch = batches.random_batch(1)
        if infinite == "loss":
            batch["loss_weights"][...] = np.inf
            before = state
        else:  # The loss is finite, but its gradient with respect to the norm's scale is not.
            huge = jax.tree.map(lambda leaf: leaf, state.params)  # copies the dicts, which are changed below
            huge["language"]["final_norm"]["scale"] = huge["language"]["final_norm"]["scale"] * 0 + 3e38
            before = dataclasses.replace(state, params=huge)
        after, metrics = train_step(before, batch)
        assert metrics["skipped"] == 1 and after.step == before.step + 1
        assert_same((after.params, after.opt_state), (before.params, before.opt_state))


@pytest.mark.large
def test_the_finiteness_check_costs_almost_nothing():
    """Times a step of the nano model with and without the check, alternately, on one device."""
    config = load_config("configs/nano.py")
    stage = dataclasses.replace(config.stages[0], steps=100)
    programs, params = {}, jax.device_put(initial_parameters(config, make_mesh(MeshConfig(), jax.devices()[:1])))
    batch = nano_batch(config)
    with pytest.MonkeyPatch.context() as patch:
        for checked in (True, False):
            if not checked:  # XLA then removes the check as a constant.
                patch.setattr(jnp, "isfinite", lambda _: np.True_)
            state = create_state(stage, params)
            compiled = jax.jit(make_train_step(config.model, stage)).lower(state, batch).compile()
            programs[checked] = compiled, state
    assert "is-finite" in programs[True][0].as_text() and "is-finite" not in programs[False][0].as_text()
    seconds = {True: [], False: []}
    for _ in range(15):
        for checked, (step, state) in programs.items():
            # CPU time of this process on all cores: other programs affect it less than wall time.
            start_time = time.process_time()
            jax.block_until_ready(step(state, batch))
            seconds[checked].append(time.process_time() - start_time)
    # The check costs nothing that can be measured; the margin is for noise.
    ratio = np.median(seconds[True]) / np.median(seconds[False])
    spread = {checked: np.percentile(values, (25, 50, 75)).round(3).tolist() for checked, values in seconds.items()}
    print(f"a nano step with the check takes {100 * (ratio - 1):+.1f} % (quartiles, CPU seconds: {spread})")
    assert ratio < 1.1


def nano_batch(config):
    """Returns two microbatches of full bins of noise, in the shapes of the config."""
    packing, rng = config.data.packing, np.random.default_rng(0)
    shape = (2, packing.bins_per_microbatch)
    batch = empty_batch(*shape, packing, tile_size=config.data.tiling.tile_size, pad_id=0)
    length = packing.tokens_per_bin
    batch["tokens"][...] = rng.integers(6, 500, (*shape, length))
    batch["targets"][...] = batch["tokens"]
    batch["segment_ids"][...] = 1
    batch["positions"][...] = np.arange(length)
    batch["loss_weights"][..., ::4] = 1
    batch["tiles"][...] = rng.integers(0, 256, batch["tiles"].shape)
    batch["tile_valid_hw"][...] = config.data.tiling.tile_size
    batch["visual_index"][..., :200] = np.arange(200)
    return {name: batch[name] for name in FIELDS}


def test_skipped_updates_are_counted_and_their_examples_named(tmp_path, capsys):
    result, losses = run(tmp_path / "run", bad=[3])
    assert result.progress.step == 5 and np.isnan(losses[3][0]) and np.isfinite(losses[4][0])
    (report,) = read_reports(tmp_path / "run")
    assert report["step"] == 3 and report["what"] == "skipped"
    # Batch 3 has the examples 16 to 23, eight for each batch.
    assert report["examples"] == sorted(f"page-{number}" for number in range(16, 24))
    output = capsys.readouterr().out
    assert "step 3: update skipped" in output and "page-16" in output and "1 updates skipped" in output


def test_too_many_skipped_updates_roll_back_and_skip_the_data(tmp_path):
    config = AnomalyConfig(max_skipped=2)
    result, _ = run(tmp_path / "run", bad=[3, 4], anomalies=config)
    assert result.progress.step == 5
    meta = read_meta(tmp_path / "run" / "checkpoints" / "5")
    # Batch 5 is skipped too: a step's metrics are read while the next step runs. "left_out" is the key in the file.
    skipped = [{"stage": 0, "step_in_stage": 2, "first": 3, "last": 5}]
    assert meta["data"]["left_out"] == skipped and meta["data"]["rows"]["0"] == 8, "5 steps and 3 skipped batches"
    # The result is the same as if those batches did not exist, even if the run is killed after the rollback.
    clean, _ = run(tmp_path / "clean", anomalies=config, skip=range(3, 6))
    assert_same(result.params, clean.params)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", bad=[3, 4], anomalies=config, stop_after=4)
    resumed, _ = run(tmp_path / "killed", bad=[3, 4], anomalies=config)
    assert_same(resumed.params, result.params)
    meta = read_meta(tmp_path / "killed" / "checkpoints" / "5")
    assert meta["data"]["left_out"] == skipped


def test_too_many_skipped_updates_end_the_run_if_configured_or_if_rollbacks_do_not_help(tmp_path):
    with pytest.raises(UserError, match="2 updates in a row were skipped by step 4.*anomalies.jsonl"):
        run(tmp_path / "stop", bad=[3, 4], anomalies=AnomalyConfig(max_skipped=2, then="stop"))
    assert find_checkpoint(tmp_path / "stop")[1] == 2
    with pytest.raises(UserError, match="after 1 rollbacks to step 2"):
        run(tmp_path / "back", bad=range(3, 99), anomalies=AnomalyConfig(max_skipped=2, max_rollbacks=1))


def test_a_rollback_returns_to_a_step_before_the_first_failure(tmp_path):
    """A checkpoint is due at step 4, between two failures. Returning to it would repeat the failure forever."""
    config = AnomalyConfig(max_skipped=3, max_rollbacks=2)
    with pytest.raises(UserError, match="after 2 rollbacks to step 2"):
        run(tmp_path / "run", bad=range(3, 99), anomalies=config)


def test_a_failed_stage_whose_start_was_not_saved_ends_the_run(tmp_path, monkeypatch):
    (first,) = tiny.config(MESH).stages
    stages = tuple(dataclasses.replace(first, name=name, steps=3) for name in ("one", "two"))
    config = AnomalyConfig(max_skipped=1)
    save = arrays.StepStore.save

    def save_except_the_end_of_stage_one(store, step, *rest):
        if step.name == "3":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(store, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(arrays.StepStore, "save", save_except_the_end_of_stage_one)
        with pytest.raises(UserError, match=r"the newest checkpoint belongs to the stage before \(step 2\)"):
            run(tmp_path / "run", bad=range(1, 99), bad_stage=1, stages=stages, anomalies=config)
    result, _ = run(tmp_path / "run", stages=stages, anomalies=config)
    assert result.progress.step == 6


@pytest.mark.skipif(jax.__version__ == "0.11.2", reason="its compiler crashes on a loop inside shard_map without jit")
def test_the_operation_that_produced_a_nan_is_named(tmp_path, monkeypatch):
    # The search executes every operation on every device, so few devices take less time.
    monkeypatch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:2]))
    with pytest.raises(UserError, match=r"step 3: [Ii]nvalid value \(nan\).*/linear_cross_entropy\.py, line \d+"):
        run(tmp_path, bad=[3], debug=DebugConfig(nans=True), mesh=(2, 1, 1))


def test_a_loss_spike_is_reported_with_its_examples(tmp_path):
    messages = []
    watch = AnomalyWatch(AnomalyConfig(spike=10.0), tmp_path / "anomalies.jsonl", messages.append)
    rng = np.random.default_rng(0)
    for step in range(1, 61):
        loss = 9.0 if step == 50 else 2.0 + 0.1 * rng.normal()
        metrics = {"loss": jnp.float32(loss), "skipped": jnp.float32(0)}
        watch.add(step, metrics, lambda step=step: [f"page-{step}"])
        assert not watch.check(before=step)
    assert [entry["step"] for entry in read_reports(tmp_path)] == [50]
    assert read_reports(tmp_path)[0] == {"step": 50, "what": "spike", "loss": 9.0, "examples": ["page-50"]}
    assert "step 50: the loss jumped (loss 9, usually 2" in messages[0] and "page-50" in messages[0]


def test_skipped_batches_are_counted():
    watch = AnomalyWatch(AnomalyConfig(), None, print)
    watch.skip_batches(0, 100, 107)
    watch.skip_batches(0, 100, 115)  # A second rollback: steps 101 to 108 used batches 108 to 115.
    assert watch.num_skipped_batches(0) == 15 and watch.num_skipped_batches(1) == 0
    assert watch.num_rollbacks_to(0, 100) == 2
    restored = AnomalyWatch(AnomalyConfig(), None, print)
    restored.load_state(watch.state())
    assert restored.state() == watch.state()
