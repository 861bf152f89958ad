"""Errors of `topology_devices`. tests/tools compiles for the slices that it can describe."""

import importlib.util

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import topology


def test_without_a_tpu_compiler_the_message_names_the_package_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        topology.topology_devices("v5e:2x2")


def test_an_invalid_shape():
    with pytest.raises(UserError, match="v5e:16x16"):
        topology.topology_devices("v5e")
