"""A run in a bucket resumes, keeps the configured steps, and falls back past a damaged one."""

import pytest
from etils import epath

from tests.training.test_bucket_faults import steps_of, train


@pytest.mark.large
def test_a_run_in_a_bucket_resumes_past_a_damaged_object(gcs_bucket, capsys):
    workdir, losses, resumed = f"{gcs_bucket}/run", {}, {}
    assert train(workdir, losses, steps=3) == 0
    assert steps_of(workdir) == ([2, 3], [2, 3]), "older steps are deleted"
    # Overwrite the largest object of the newest step.
    largest = max(
        epath.Path(f"{workdir}/checkpoints/3/params").glob("ocdbt.process_0/d/*"), key=lambda p: p.stat().length
    )
    content = largest.read_bytes()
    largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert train(workdir, resumed, steps=3) == 0
    assert resumed == {3: losses[3]}
    assert f"{workdir}/checkpoints/3 is skipped: params/ocdbt.process_0/d/{largest.name}" in capsys.readouterr().err
