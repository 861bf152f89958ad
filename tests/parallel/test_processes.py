"""Runs of several processes on this machine: they give the results of one process, and all end if one of them dies."""

import dataclasses
import json
import shutil
import signal
import time

import jax
import numpy as np
import psutil
import pytest

from alignvlm_jax.checkpoints import weights
from alignvlm_jax.checkpoints.workdir import complete_steps, find_checkpoint
from alignvlm_jax.config.serialization import config_to_dict
from alignvlm_jax.config.stages import MixturePart
from alignvlm_jax.data.packing import PackingConfig
from alignvlm_jax.data.synthetic.corpus import build_corpus
from tests.data.nano_tokenizer import write_chat_folder
from tests.parallel import processes, tiny
from tests.training import batches

HOSTS = ["host0", "host1", "host2"]


@pytest.fixture(scope="module")
def single_process_losses(tmp_path_factory):
    """Losses and refused examples of each step in a run of one process."""
    losses = {}
    tiny.train(tmp_path_factory.mktemp("single") / "run", tiny.config((2, 2, 2)), losses=losses, examples=[])
    return losses


def read_logs(workdir, num_processes):
    """Returns the losses, which must be the same in every process, and the examples that all processes made."""
    files = [json.loads(open(f"{workdir}.{num_processes}.{i}.json").read()) for i in range(num_processes)]
    losses = [{int(step): value for step, value in file["losses"].items()} for file in files]
    assert all(losses[0] == other for other in losses)
    return losses[0], [example for file in files for example in file["examples"]]


def assert_same_losses(losses, expected, steps):
    """Asserts that exactly these steps were done, with the expected losses, and that refusals are counted once."""
    assert list(losses) == list(steps)
    for step, (loss, refused) in losses.items():
        # Reductions between processes may sum in another order, so the losses need not be equal bit for bit.
        np.testing.assert_allclose(loss, expected[step][0], rtol=1e-5, err_msg=f"step {step}")
        assert refused == tiny.ROWS, "each row is counted once"


def expected_examples(steps):
    """Returns [step index, row] of every random bin that the steps use."""
    return [[step - 1, row] for step in steps for row in range(tiny.ROWS)]


def stopped_run(tmp_path, num_processes, single_process_losses):
    """Returns the workdir of a run that ended because its last process received SIGTERM after step 2."""
    workdir, stops = tmp_path / "run", [None] * (num_processes - 1) + [2]
    job = processes.start(
        tmp_path / "output",
        "train",
        num_processes,
        devices=8 // num_processes,
        workdir=str(workdir),
        mesh=(2, 2, 2),
        stop_at=stops,
    )
    assert processes.finish(job) == [75] * num_processes, job[0].text()
    losses, examples = read_logs(workdir, num_processes)
    # One process gets the signal after step 2; all agree on it during step 3, and save that.
    assert_same_losses(losses, single_process_losses, [1, 2, 3])
    assert sorted(examples) == expected_examples([1, 2, 3]), "each example is made by one process"
    assert find_checkpoint(workdir) == (workdir, 3)
    assert "interrupted: saved after step 3" in job[0].text() and "| loss" in job[0].text()
    assert "| loss" not in job[1].text(), "only process 0 prints"
    return workdir


@pytest.mark.large
def test_a_failed_save_on_one_process_ends_both_and_the_run_resumes_from_the_step_before(
    single_process_losses, tmp_path
):
    workdir = tmp_path / "run"
    two = processes.start(
        tmp_path / "two",
        "train",
        2,
        devices=4,
        workdir=str(workdir),
        mesh=(2, 2, 2),
        save_every=1,
        disk_fails_at=[None, 3],
    )
    codes = processes.finish(two)
    assert codes[1] == 2 and codes[0] != 0, two[0].text() + two[1].text()
    # Process 0's output is checked, because process 1's is truncated by the file-size limit that it ran into.
    message = two[0].text()
    assert (
        "process 1 of 2) ended with an error: UserError: step 3 could not be saved" in message and "File too" in message
    )
    assert max(complete_steps(workdir / "checkpoints")) == 2
    losses = {}
    tiny.train(workdir, tiny.config((2, 2, 2)), losses=losses, examples=[])
    assert_same_losses(losses, single_process_losses, [3, 4, 5])


def resume_in_one_process(workdir, single_process_losses):
    losses = {}
    tiny.train(workdir, tiny.config((2, 2, 2)), losses=losses, examples=[])
    assert_same_losses(losses, single_process_losses, [4, 5])


def test_two_processes_train_as_one_and_one_resumes(single_process_losses, tmp_path):
    resume_in_one_process(stopped_run(tmp_path, 2, single_process_losses), single_process_losses)


@pytest.mark.large
def test_four_processes_train_as_one_and_two_resume(single_process_losses, tmp_path):
    workdir = stopped_run(tmp_path, 4, single_process_losses)
    shutil.copytree(workdir, tmp_path / "copy")
    resume_in_one_process(tmp_path / "copy", single_process_losses)
    two = processes.start(tmp_path / "two", "train", 2, devices=4, workdir=str(workdir), mesh=(2, 2, 2))
    assert processes.finish(two) == [0] * 2, two[0].text()
    losses, examples = read_logs(workdir, 2)
    assert_same_losses(losses, single_process_losses, [4, 5])
    assert sorted(examples) == expected_examples([4, 5])
    written = np.load(f"{workdir}.npz")
    for path, leaf in jax.tree.leaves_with_path(weights.restore_params(workdir)):
        np.testing.assert_array_equal(leaf, written[jax.tree_util.keystr(path)])


@pytest.mark.large
def test_each_document_is_read_by_one_process(tmp_path):
    """Two epochs of 40 documents with the real pipeline: two processes share the examples of the same batches."""
    tokenizer = write_chat_folder(tmp_path / "tokenizer")
    build_corpus(tmp_path / "documents", seed=0, sizes={"train": 40}, progress=False)
    model = dataclasses.replace(
        tiny.MODEL, language=dataclasses.replace(tiny.MODEL.language, vocab_size=352, max_position_embeddings=512)
    )
    config = tiny.config((4, 1, 2), model=model)
    packing = PackingConfig(tokens_per_bin=320, tiles_per_bin=12, bins_per_microbatch=4, examples_per_bin=4)
    config = dataclasses.replace(
        config,
        tokenizer=str(tokenizer),
        data=dataclasses.replace(config.data, root=str(tmp_path), packing=packing),
        stages=(
            batches.stage(mixture=(MixturePart("documents", task="qa"),), steps=None, epochs=2.0, global_batch=12),
        ),
    )
    losses, documents = {}, []
    tiny.train(tmp_path / "single", config, losses=losses, examples=documents, documents=True)
    assert sorted(documents) == sorted([*range(40)] * 2) and len(losses) >= 4

    workdir = tmp_path / "two"
    two = processes.start(tmp_path / "out", "train", 2, devices=4, workdir=str(workdir), config=config_to_dict(config))
    assert processes.finish(two) == [0] * 2, two[0].text()
    losses_of_two, documents_of_two = read_logs(workdir, 2)
    assert losses_of_two.keys() == losses.keys()
    for step, (loss, _) in losses_of_two.items():
        np.testing.assert_allclose(loss, losses[step][0], rtol=1e-5, err_msg=f"step {step}")
    assert sorted(documents_of_two) == sorted(documents)
    # Both processes read some of the documents.
    assert all(set(json.loads(open(f"{workdir}.2.{i}.json").read())["examples"]) for i in range(2))


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_dies_the_others_end_and_name_its_machine(tmp_path, victim):
    three = processes.start(tmp_path, "count", 3, host=HOSTS)
    for process in three:
        process.wait_for("counted 2")
    for process in three:  # As Slurm does to every process of a job. The watchers must survive it.
        (watcher,) = psutil.Process(process.process.pid).children()
        watcher.terminate()
    three[victim].process.kill()
    codes = processes.finish(three, seconds=60)
    for i, process in enumerate(three):
        assert codes[i] == -signal.SIGKILL if i == victim else codes[i] > 0
        message = f"host{victim} (process {victim} of 3) was killed or crashed; process {i} on host{i} ends with it"
        assert (message in process.text()) == (i != victim), process.text()


@pytest.mark.large
def test_when_a_machine_falls_silent_the_others_end_and_name_it(tmp_path):
    three = processes.start(tmp_path, "count", 3, host=HOSTS)
    for process in three:
        process.wait_for("counted 2")
    parent = psutil.Process(three[1].process.pid)
    silent = [parent, *parent.children()]  # The process and its watcher.
    for process in silent:
        process.suspend()
    start_time = time.monotonic()
    codes = [three[i].process.wait(60) for i in (0, 2)]
    assert time.monotonic() - start_time < 60 and min(codes) > 0
    for process in silent:
        process.kill()
    processes.finish(three)
    for i in (0, 2):
        assert "host1 (process 1 of 3) has sent nothing for 20 s" in three[i].text()


def test_when_a_process_fails_the_others_report_its_error(tmp_path):
    two = processes.start(tmp_path, "count", 2, host=HOSTS, fail_at=[None, 3])
    codes = processes.finish(two, seconds=60)
    assert codes[0] != 0 and codes[1] == 2
    assert "host1 (process 1 of 2) ended with an error: UserError: the image of page-7" in two[0].text()


def test_hosts_that_differ_are_named_on_every_host(tmp_path):
    three = processes.start(
        tmp_path, "count", 3, devices=1, host=HOSTS, config=[{"seed": 0}, {"seed": 1, "mesh": {"data": 2}}, {"seed": 0}]
    )
    assert processes.finish(three, seconds=60) == [2] * 3
    for process in three:
        assert "config.seed: 0 on most; 1 on host1 (process 1)" in process.text()
        assert "config.mesh.data: None on most; 2 on host1 (process 1)" in process.text()
