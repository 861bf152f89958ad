"""Errors of `topology_devices`; tests/tools/test_compile_tpu.py compiles for real topologies."""

import importlib.util

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import topology


def test_a_missing_tpu_compiler_is_reported_with_the_package_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        topology.topology_devices("v5e:2x2")


def test_an_invalid_shape_is_refused_with_an_example():
    with pytest.raises(UserError, match="v5e:16x16"):
        topology.topology_devices("v5e")
