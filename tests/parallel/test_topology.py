"""Errors of `topology_devices`; tests/commands/test_compile.py compiles for real topologies."""

import importlib.util

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import topology
from alignvlm_jax.parallel.chips import find_chip


def test_a_missing_tpu_compiler_is_reported_with_the_package_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        topology.topology_devices("v5e:2x2")


@pytest.mark.skipif(not topology.has_compiler(), reason="libtpu is only available for Linux on x86")
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5p:2x2x1"])
def test_the_two_cores_of_a_chip_are_one_device(name):
    assert len(topology.topology_devices(name)) == 4


def test_an_invalid_shape_is_refused_with_an_example():
    with pytest.raises(UserError, match="v5e:16x16"):
        topology.topology_devices("v5e")


@pytest.mark.skipif(not topology.has_compiler(), reason="libtpu is only available for Linux on x86")
def test_ironwood_has_two_devices_per_chip():
    devices = topology.topology_devices("tpu7x:2x2x1")
    chip = find_chip(devices[0].device_kind)
    assert chip.name == "TPU7x" and len(devices) == 4 * chip.devices_per_chip == 8
