"""Checkpoints in a bucket keep the guarantees of those on a disk."""

import numpy as np
import pytest

from alignvlm_jax.checkpoints import integrity
from alignvlm_jax.checkpoints.arrays import StoredTree
from alignvlm_jax.checkpoints.workdir import complete_steps, find_undamaged, numbered_steps
from alignvlm_jax.locations import open_location
from alignvlm_jax.storage.objects import list_objects
from tests.checkpoints.test_integrity import restored_step, write_steps


@pytest.fixture(params=["gcs", "s3"])
def workdir(request):
    """An empty folder in a bucket."""
    return open_location(request.getfixturevalue(f"{request.param}_bucket")) / "runs" / "a"


def test_steps_are_kept_skipped_and_replaced(workdir, capsys):
    """google/orbax#1652: a run in a bucket was written to a local folder. One run, because saves take their time."""
    checkpoints = workdir / "checkpoints"
    write_steps(workdir, 10, 20, 30, keep=2)
    assert complete_steps(checkpoints) == numbered_steps(checkpoints) == [20, 30]
    assert restored_step(workdir) == 30
    tree = StoredTree(checkpoints / "30" / "params")
    assert tree.shapes == {"language/embedding": (64,)} and tree.dtypes == {"language/embedding": np.float32}
    assert np.array_equal(tree.read("language/embedding", (slice(3, 5),)), [30, 30])

    # Deleted, truncated and changed objects: each is named, and the step before is used.
    step = checkpoints / "30"
    name = next(name for name in list_objects(step) if name.startswith("params/ocdbt.process_0/d/"))
    content = (step / name).read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    for damaged, reason in ((None, "is missing"), (content[:-1], "expected"), (flipped, "does not match its digest")):
        (step / name).unlink() if damaged is None else (step / name).write_bytes(damaged)
        assert name in integrity.damage(step) and reason in integrity.damage(step)
    assert restored_step(workdir) == find_undamaged_of_config(workdir) == 20
    assert f"{step} is skipped: {name}" in capsys.readouterr().err
    # The same content in another version of the object, as in a copy of the run.
    (step / name).write_bytes(content)
    assert integrity.damage(step) is None

    # A step whose seal is missing does not count, and the next save replaces it.
    (step / "digests.0-of-1.json").unlink()
    assert complete_steps(checkpoints) == [20]
    write_steps(workdir, 30, keep=2)
    assert restored_step(workdir) == 30 and numbered_steps(checkpoints) == [20, 30]


def find_undamaged_of_config(workdir):
    (workdir / "config.json").write_text("{}")
    return find_undamaged(workdir)[1]
