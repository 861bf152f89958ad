"""What one of several processes does in a test; see processes.py."""

import dataclasses
import json
import os
import pathlib
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
    """Adds up over all processes, again and again, as hosts "host0", "host1", ... that are told a config each."""
    del host
    distributed.agree({"config": config or {}})
    for step in range(600):
        total = float(distributed.add_up({"one": 1.0})["one"])
        assert total == jax.process_count()
        print("counted", step, flush=True)
        if step == fail_at:
            raise UserError("the picture of page-7 is not one")
        time.sleep(0.05)


def train(workdir, mesh=None, config=None, stop_at=None, save_every=None):
    """Trains the tiny model, on random bins or on a config's documents; "WORKDIR.N.I.json" is what process I of N heard
    of each step, and made."""
    from alignvlm_jax import config as configs
    from tests.parallel import tiny

    me = jax.process_index()
    losses, made = {}, []
    on_step = None
    if stop_at is not None:
        on_step = lambda step: step == stop_at and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    try:
        experiment = tiny.config(mesh) if config is None else configs.from_dict(config)
        if save_every is not None:
            often = dataclasses.replace(experiment.checkpoint, every_steps=save_every)
            experiment = dataclasses.replace(experiment, checkpoint=often)
        result = tiny.train(
            workdir, experiment, losses=losses, made=made, documents=config is not None, on_step=on_step
        )
        params = multihost_utils.process_allgather(result.params, tiled=True)
        if me == 0:
            np.savez(
                f"{workdir}.npz",
                **{jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)},
            )
    finally:
        with open(f"{workdir}.{jax.process_count()}.{me}.json", "w") as file:
            json.dump({"losses": losses, "made": made}, file)


def steps(workdir, journal, steps):
    """Trains the run of `tests/training/test_kill.py`."""
    from tests.parallel import tiny
    from tests.training import test_kill

    tiny.train(workdir, test_kill.experiment(steps), losses=test_kill.Journal(pathlib.Path(journal)), made=[])


def read(config, workdir, note, stop_at=None):
    """Trains as a config says until it is stopped, and notes the rows of batches that were made here."""
    from alignvlm_jax import config as configs
    from tests.training import watched

    experiment = configs.from_dict(json.loads(pathlib.Path(config).read_text()))

    def on_step(step):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    _, seen = watched.train(experiment, workdir, on_step=on_step)
    pathlib.Path(note).write_text(json.dumps(seen))


def evaluate(checkpoint, data, limit, predictions):
    """`alignvlm eval`, on whatever mesh it chooses for several processes."""
    from alignvlm_jax.evaluation import runner

    options = dict(split="validation", limit=limit, batch_size=6)
    report = runner.evaluate_checkpoint(checkpoint, data=data, predictions_file=predictions, **options)
    print("answered", len(report.answers))


def benchmarks(checkpoint, name, data, limit, batch_size, predictions):
    """`alignvlm eval --benchmark`, likewise."""
    from alignvlm_jax.evaluation.benchmarks.runner import evaluate_benchmarks

    options = dict(limit=limit, batch_size=batch_size, predictions_file=predictions)
    evaluate_benchmarks(checkpoint, [name], data=data, **options)


def main():
    task, coordinator, number, process, arguments = sys.argv[1:]
    arguments = json.loads(arguments)
    if "host" in arguments:
        socket.gethostname = lambda: arguments["host"]
    try:
        with distributed.joined(coordinator, int(number), int(process)):
            globals()[task](**arguments)
    except UserError as error:
        print(f"alignvlm: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
