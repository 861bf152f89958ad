"""Process 0 takes a lease for all processes. The other processes are tested with its answer, without starting any."""

import json

import pytest

from alignvlm_jax.errors import TemporaryError, UserError
from alignvlm_jax.leases.lease import InUseError
from alignvlm_jax.leases.lease_file import SeenLease
from alignvlm_jax.leases.one_writer import KIND_VARIABLE, one_writer
from alignvlm_jax.parallel import writing


@pytest.fixture
def other_process(monkeypatch):
    """Makes this process one that is not the first, and takes the first one's answers from a list."""
    answers = []
    monkeypatch.setattr(writing.distributed, "is_primary", lambda: False)
    monkeypatch.setattr(
        writing.distributed, "gather_json", lambda value: [answers.pop(0), json.loads(json.dumps(value))]
    )
    return answers


def test_process_0_holds_the_lease(tmp_path):
    with writing.one_writer_of(tmp_path) as lease, pytest.raises(InUseError) as info:
        lease.check()
        with writing.one_writer_of(tmp_path):
            pytest.fail("the block must not run")
    # `distributed.initialized` lets processes that end together wait for each other.
    assert info.value.is_common


@pytest.mark.parametrize("is_temporary, kind, code", [(True, TemporaryError, 75), (False, UserError, 2)])
def test_all_processes_learn_of_a_refusal(other_process, tmp_path, is_temporary, kind, code):
    other_process += [["it is in use", is_temporary]]
    with pytest.raises(kind, match="it is in use") as info, writing.one_writer_of(tmp_path):
        pytest.fail("the block must not run")
    assert info.value.exit_code == code and info.value.is_common


def test_all_processes_can_check_the_lease(other_process, tmp_path, monkeypatch):
    monkeypatch.setenv(KIND_VARIABLE, "shared")
    with one_writer(tmp_path) as first:
        other_process += [[None, False], first.ticket()]
        with writing.one_writer_of(tmp_path) as lease:
            assert isinstance(lease, SeenLease)
            lease.check()
        first.check()
