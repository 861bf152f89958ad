"""Tasks that `processes.start` runs in each process of a test."""

import dataclasses
import json
import os
import pathlib
import re
import resource
import signal
import socket
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import distributed


def count(host, config=None, fail_at=None):
    """Checks that all processes have the same config, then sums over them again and again."""
    del host  # Used by `main`.
    distributed.require_equal({"config": config or {}})
    for step in range(600):
        total = float(distributed.sum_over_processes({"one": 1.0})["one"])
        assert total == jax.process_count()
        print("counted", step, flush=True)
        if step == fail_at:
            raise UserError("the image of page-7 cannot be decoded")
        time.sleep(0.05)


def train(workdir, mesh=None, config=None, stop_at=None, save_every=None, disk_fails_at=None):
    """Trains the tiny model on random bins, or on the documents of a config.

    Process I of N writes its logged losses and the examples it made to WORKDIR.N.I.json.

    Args:
      workdir: folder of the run.
      mesh: sizes of the mesh, for random bins.
      config: config as a dict, for documents.
      stop_at: step at which this process sends itself SIGTERM.
      save_every: number of steps between checkpoints.
      disk_fails_at: step from which this process cannot write files of more than 20 kB.
    """
    from alignvlm_jax.config.serialization import config_from_dict
    from tests.parallel import tiny

    process_index = jax.process_index()
    losses, examples = {}, []

    def on_step(step):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == disk_fails_at:
            # The files of a checkpoint are larger than this, so the next save fails with "File too large".
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    try:
        experiment = tiny.config(mesh) if config is None else config_from_dict(config)
        if save_every is not None:
            checkpoint = dataclasses.replace(experiment.checkpoint, every_steps=save_every)
            experiment = dataclasses.replace(experiment, checkpoint=checkpoint)
        result = tiny.train(
            workdir, experiment, losses=losses, examples=examples, documents=config is not None, on_step=on_step
        )
        assert "torch" not in sys.modules, "a run needs no torch, whose import takes a second"
        params = multihost_utils.process_allgather(result.params, tiled=True)
        if process_index == 0:
            np.savez(
                f"{workdir}.npz",
                **{jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)},
            )
    finally:
        with open(f"{workdir}.{jax.process_count()}.{process_index}.json", "w") as file:
            json.dump({"losses": losses, "examples": examples}, file)


def train_with_journal(workdir, journal, steps):
    """Trains the experiment of `tests/training/test_kill.py`, which kills this process."""
    from tests.parallel import tiny
    from tests.training import test_kill

    tiny.train(workdir, test_kill.experiment(steps), losses=test_kill.Journal(pathlib.Path(journal)), examples=[])


def measure_cost(workdir, mesh, output_file, stop_at):
    """Trains a model of 300 MB up to a step, and writes its peak memory and the bytes it read to `output_file`."""
    from alignvlm_jax.config.experiment import BackbonesConfig
    from alignvlm_jax.training.initial import initial_parameters
    from tests.parallel import tiny

    language = dataclasses.replace(tiny.MODEL.language, vocab_size=2**17, hidden_size=576, num_heads=8, num_kv_heads=8)
    model = dataclasses.replace(tiny.MODEL, language=language)
    experiment = dataclasses.replace(tiny.config(mesh, model=model), backbones=BackbonesConfig("random", "random"))
    costs = {}

    def bytes_read():
        return int(re.search(r"rchar: (\d+)", pathlib.Path("/proc/self/io").read_text())[1])

    def measure(when):
        peak = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
        costs[when] = {"peak": 1024 * int(peak[1]), "read": bytes_read() - before}
        pathlib.Path(output_file).write_text(json.dumps(costs))

    def on_step(step):
        if step == stop_at:
            measure("after a step")
            os.kill(os.getpid(), signal.SIGTERM)

    before = bytes_read()
    tiny.train(
        workdir,
        experiment,
        losses={},
        examples=[],
        make_params=initial_parameters,
        on_stage_start=lambda *_: measure("before a step"),
        on_step=on_step,
    )


def record_batches(config, workdir, output_file, stop_at=None):
    """Trains with a config until it is stopped, and writes the batch rows that this process made to `output_file`."""
    from alignvlm_jax.config.serialization import config_from_dict
    from tests.training import recording

    experiment = config_from_dict(json.loads(pathlib.Path(config).read_text()))

    def on_step(step):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    _, batches = recording.train(experiment, workdir, on_step=on_step)
    pathlib.Path(output_file).write_text(json.dumps(batches))


def evaluate(checkpoint, data, limit, predictions):
    """Runs `alignvlm eval`, which chooses its own mesh for several processes."""
    from alignvlm_jax.evaluation import runner

    options = dict(split="validation", limit=limit, batch_size=6)
    report = runner.evaluate_checkpoint(checkpoint, data=data, predictions_file=predictions, **options)
    print("answered", len(report.answers))


def benchmarks(checkpoint, name, data, limit, batch_size, predictions):
    """Runs `alignvlm eval --benchmark`, which chooses its own mesh for several processes."""
    from alignvlm_jax.evaluation.benchmarks.runner import evaluate_benchmarks

    options = dict(limit=limit, batch_size=batch_size, predictions_file=predictions)
    evaluate_benchmarks(checkpoint, [name], data=data, **options)


def main():
    """Joins the run and performs the task of the command line; exits like `alignvlm`."""
    task, coordinator, num_processes, process, arguments = sys.argv[1:]
    arguments = json.loads(arguments)
    if "host" in arguments:
        # The processes of a test share a machine; messages must name different hosts all the same.
        socket.gethostname = lambda: arguments["host"]
    try:
        with distributed.initialized(coordinator, int(num_processes), int(process)):
            globals()[task](**arguments)
    except UserError as error:
        print(f"alignvlm: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:  # As in `cli.main`.
        sys.exit(getattr(error, "exit_code", 130))


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
