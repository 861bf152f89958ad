"""`--verify` of an export: one page through the checkpoint in JAX and the exported folder in PyTorch.

tests/interop/pytorch/test_verification.py compares loaded models.
"""

import dataclasses
import importlib.metadata

import numpy as np
import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.verification import Comparison, Result, check_packages, verify_export
from alignvlm_jax.interop.export import export_alignvlm
from tests.interop.exported import make_checkpoint


@pytest.mark.large
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_exported_folder_is_verified(tmp_path, dtype):
    """bfloat16: the weights of both sides are rounded the same way, so their logits still agree in float32."""
    make_checkpoint(tmp_path / "checkpoint")
    export_alignvlm(tmp_path / "checkpoint", tmp_path / "folder", dtype=dtype)
    sides = []
    comparison = verify_export(tmp_path / "checkpoint", tmp_path / "folder", dtype=dtype, on_side=sides.append)
    assert sides == ["JAX", "PyTorch"]
    assert comparison.problems == [] and comparison.difference < 1e-5


def test_every_difference_is_named():
    logits = np.array([[1.0, -4.0]], np.float32)
    result = Result(np.arange(3), np.arange(1), "12.50", logits)

    def problems(**changes):
        return Comparison("a?", result, dataclasses.replace(result, **changes)).problems

    assert problems() == problems(logits=logits + 0.003, seconds=2.0) == []
    assert problems(logits=logits + 0.005) == ["the logits differ by more than the tolerance"]
    assert problems(logits=logits * np.nan) == ["the logits differ by more than the tolerance"]
    assert problems(answer="12.5") == ["the answers differ"]
    assert problems(tokens=np.arange(4)) == ["the prompts have different token ids"]


def test_missing_and_old_packages_are_named(monkeypatch):
    check_packages()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"torch": "2.13.0", "transformers": "4.57.1"}[name])
    with pytest.raises(UserError, match=r"transformers 5, and this is 4.57.1: pip install 'alignvlm-jax\[torch\]'"):
        check_packages()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match="needs torch, which is not installed"):
        check_packages()
