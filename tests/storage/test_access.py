"""A bucket is checked before any long work: what passes is waited for, and what does not is one line."""

import itertools

import pytest

from alignvlm_jax import cli
from alignvlm_jax.errors import TemporaryError, UserError
from alignvlm_jax.storage.access import check_writable
from alignvlm_jax.storage.objects import list_objects
from tests import fault_proxy


def test_a_permission_that_arrives_late_is_waited_for(gcs_proxy):
    """Workload identities of GKE: a new machine gets 403 for some seconds."""
    waits, requests = [], itertools.count()
    gcs_proxy.fault = lambda request: fault_proxy.Fault(status=403) if next(requests) < 2 else None
    check_writable(f"{gcs_proxy.bucket}/run", sleep=waits.append)
    assert waits == [2, 4] and not list_objects(gcs_proxy.bucket)


def test_a_permission_that_never_arrives_is_an_error_to_fix(gcs_proxy):
    waits = []
    gcs_proxy.fault = fault_proxy.forbidden
    with pytest.raises(UserError, match="run: no permission .*has no access") as info:
        check_writable(f"{gcs_proxy.bucket}/run", sleep=waits.append)
    assert waits == [2, 4, 8] and not isinstance(info.value, TemporaryError)


def test_train_names_a_bucket_that_does_not_exist(gcs_bucket, tmp_path, monkeypatch, capsys):
    """Before it draws pages for the config, which takes minutes."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--config", "configs/nano.py", "--workdir", "gs://no-such-bucket/run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "gs://no-such-bucket/run: there is no bucket gs://no-such-bucket" in line
    assert not list(tmp_path.iterdir())
