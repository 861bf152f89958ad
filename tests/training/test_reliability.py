"""A run on a disk that fills up, the budget printed before the first step, the cost of resuming, and no unpickling."""

import dataclasses
import json
import pathlib
import re
import time

import jax
import pytest

from alignvlm_jax.checkpoints import weights
from alignvlm_jax.checkpoints.workdir import complete_steps, find_undamaged
from alignvlm_jax.config.run import CheckpointConfig
from alignvlm_jax.parallel.mesh import make_mesh
from alignvlm_jax.training import budget
from tests.parallel import processes, tiny
from tests.training import breakage

MESH = (8, 1, 1)


def config(**changes):
    return dataclasses.replace(tiny.config(MESH), checkpoint=CheckpointConfig(**{"every_steps": 1, **changes}))


def run(workdir, experiment, **options):
    losses = {}
    return tiny.train(workdir, experiment, losses=losses, examples=[], **options), losses


def test_a_disk_that_fills_up_does_not_end_a_run(tmp_path, capsys):
    recorded = {}
    with breakage.small_disk(tmp_path / "disk", 8) as disk:

        def on_step(step):
            steps = lambda: complete_steps(disk / "run" / "checkpoints")  # noqa: E731
            if step == 2:  # `on_step` is called before step 2 is saved
                while not steps():
                    time.sleep(0.01)
                recorded["filler"] = breakage.fill(disk)
            if step == 4:  # the save of step 3 waited until that of step 2 had failed
                recorded["steps"] = steps()
                recorded["filler"].unlink()

        result, _ = run(disk / "run", config(), on_step=on_step)
        assert result.progress.step == 5 and recorded["steps"] == [1]
        assert find_undamaged(disk / "run")[1] == 5
    output = capsys.readouterr().err
    assert re.search(r"warning: step 2 could not be saved in .*: No space left on device; the newest", output), output


def test_the_budget_names_checkpoint_sizes_and_free_space(tmp_path, capsys):
    experiment = config(keep=2, keep_best=1)
    text = budget.describe(experiment, experiment.stages, make_mesh(experiment.mesh), tmp_path / "not" / "there")
    params = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny.make_params(experiment)))
    size = f"{3 * params / 2**20:.1f}"  # weights and Adam's two moments; the counters vanish in rounding
    assert f"checkpoints: at most {size} MiB each, 4 at a time" in text and "GiB free" in text
    with breakage.small_disk(tmp_path / "disk", 1) as disk:
        assert "warning" in budget.describe(
            config(keep=1000), experiment.stages, make_mesh(experiment.mesh), disk / "run"
        )


@pytest.mark.large
@pytest.mark.parametrize("num_processes", [1, 2])
def test_resuming_needs_no_more_memory_than_a_fresh_start_and_reads_each_byte_twice(tmp_path, num_processes):
    """Measures peak memory and bytes read, for a model of 300 MB in one process and sharded over two."""
    costs, checkpoints, step = {}, tmp_path / "run" / "checkpoints", 0
    for start in ("fresh", "resumed"):
        files = [str(tmp_path / f"{start}.{i}.json") for i in range(num_processes)]
        arguments = dict(workdir=str(tmp_path / "run"), mesh=(1, num_processes, 1), output_file=files, stop_at=step + 1)
        job = processes.start(tmp_path / start, "measure_cost", num_processes, devices=1, **arguments)
        assert processes.finish(job, seconds=1500) == [75] * num_processes, job[0].text()
        costs[start] = [json.loads(pathlib.Path(file).read_text()) for file in files]
        if start == "fresh":
            step = max(complete_steps(checkpoints))
            size = sum(path.stat().st_size for path in (checkpoints / str(step)).rglob("*") if path.is_file())
            assert size > 8e8, "weights and Adam's two moments, compressed"
    for fresh, resumed in zip(costs["fresh"], costs["resumed"], strict=True):
        peaks = [cost["after a step"]["peak"] for cost in (fresh, resumed)]
        read = resumed["before a step"]["read"] - fresh["before a step"]["read"]
        print(
            f"{num_processes} processes, a checkpoint of {size / 1e6:.0f} MB: peak {peaks[0] / 1e6:.0f} MB fresh, "
            f"{peaks[1] / 1e6:.0f} MB resumed ({fresh['before a step']['peak'] / 1e6:.0f} and "
            f"{resumed['before a step']['peak'] / 1e6:.0f} MB before the first step); {read / 1e6:.0f} MB read"
        )
        # The margin of 2 % is far smaller than another copy of the weights.
        assert peaks[1] <= 1.02 * peaks[0]
        # Each process reads its share twice: once for the digests and once for the weights.
        assert read < 1.05 * 2 * size / num_processes


# The code in a model card, and in the command that merges an adapter, is text for the user.
_TEXTS = ("interop/model_card.py", "downloads/contents.py")
# Compiled programs, which are code. `alignvlm ask` stores them in the cache folder, which only its user may write.
_OWN_CODE = ("inference/prepared.py",)


def test_nothing_is_unpickled_and_no_archive_is_unpacked_blindly():
    """The package must not execute code from files it reads, or extract archives to paths that they choose."""
    root = pathlib.Path(weights.__file__).parents[1]
    forbidden = re.compile(
        r"(import|from) (pickle|dill|joblib|cloudpickle|shelve|marshal)|\bpickle\.loads?\(|allow_pickle\s*=\s*True"
        r"|torch\.load\((?!.*weights_only=True)|yaml\.(unsafe_)?load\(|extractall\((?!.*filter=\"data\")|unpack_archive\("
        r"|trust_remote_code\s*=\s*True"
    )
    matches = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in root.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if forbidden.search(line) and path.relative_to(root).as_posix() not in _TEXTS + _OWN_CODE
    ]
    assert not matches, matches
