"""What `topology_devices` says where it cannot describe a slice. What it describes, `tests/tools` compiles for."""

import importlib.util

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import topology


def test_without_a_tpu_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        topology.topology_devices("v5e:2x2")


def test_a_shape_that_is_none():
    with pytest.raises(UserError, match="v5e:16x16"):
        topology.topology_devices("v5e")
