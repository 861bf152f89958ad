"""`--verify` of an export: one page through the checkpoint in JAX and the exported folder in PyTorch."""

import dataclasses
import importlib.metadata

import numpy as np
import pytest
import safetensors.torch

from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import verification
from alignvlm_jax.inference.verification import Comparison, Result, check_packages, read_page, verify_export
from alignvlm_jax.interop.export import export_alignvlm
from tests.interop.exported import make_checkpoint


def test_an_export_is_verified_and_a_change_is_noticed(tmp_path):
    """bfloat16 weights: the checkpoint's are rounded the same way, so the logits still agree in float32."""
    make_checkpoint(tmp_path / "checkpoint", "mlp")
    folder = tmp_path / "folder"
    export_alignvlm(tmp_path / "checkpoint", folder, dtype="bfloat16")
    sides = []
    comparison = verify_export(tmp_path / "checkpoint", folder, dtype="bfloat16", on_side=sides.append)
    assert sides == ["JAX", "PyTorch"]
    assert comparison.problems == [] and comparison.difference < 1e-5
    # The same JAX result against a folder with one wrong matrix.
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.connector.linear_out.weight"] *= 1.1
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    page, question = read_page(None)
    answer = np.zeros(len(comparison.in_jax.logits) - 1, np.int32)
    changed = verification._run_pytorch(folder, page, question, answer)
    assert "the logits differ" in " ".join(dataclasses.replace(comparison, in_pytorch=changed).problems)


def test_every_difference_is_named():
    logits = np.array([[1.0, -4.0]], np.float32)
    result = Result(np.arange(3), "12.50", logits, 1.0)

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
