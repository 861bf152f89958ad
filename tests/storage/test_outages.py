"""A bucket that does not answer is an error that passes, wherever a location is read or written."""

import io
import types

import PIL.Image
import pytest

from alignvlm_jax import cli
from alignvlm_jax.data.paths import open_binary
from alignvlm_jax.data.store import open_dataset
from alignvlm_jax.data.synthetic.corpus import build_corpus
from alignvlm_jax.downloads.bucket_copy import local_copy
from alignvlm_jax.errors import TemporaryError
from alignvlm_jax.evaluation.benchmarks.predictions import Predictions
from alignvlm_jax.locations import open_location
from alignvlm_jax.output_files import open_atomically
from alignvlm_jax.storage.clients import file_system
from alignvlm_jax.storage.errors import mark_as_used
from tests import fault_proxy


@pytest.fixture
def bucket(gcs_proxy, monkeypatch, tmp_path):
    """A bucket whose client waits for nothing between its attempts."""

    async def no_sleep(seconds):
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio", types.SimpleNamespace(sleep=no_sleep))
    monkeypatch.setattr("alignvlm_jax.storage.versioned._DEADLINE", 0.1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return gcs_proxy.bucket


@pytest.mark.parametrize("fault", [fault_proxy.outage, fault_proxy.forbidden])
def test_files(fault, bucket, gcs_proxy):
    page = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(page, "PNG")
    open_location(f"{bucket}/page.png").write_bytes(page.getvalue())
    mark_as_used(bucket)  # so that a 403 is a permission that was lost
    ask = ["ask", "--checkpoint", "nano", f"{bucket}/page.png", "--question", "?"]
    with Predictions(f"{bucket}/p.jsonl") as predictions, open_binary(f"{bucket}/page.png") as stream:
        predictions.begin("docvqa", {})
        gcs_proxy.fault = fault
        with pytest.raises(TemporaryError):
            predictions.add("docvqa", {"1": "a"})
        with pytest.raises(TemporaryError):
            stream.read()
        with pytest.raises(TemporaryError), open_atomically(f"{bucket}/scores.json") as file:
            file.write("{}")
        with pytest.raises(TemporaryError):
            local_copy(bucket)
        assert cli.main(ask) == TemporaryError.exit_code
        gcs_proxy.fault = fault_proxy.no_fault
        predictions.add("docvqa", {"2": "b"})
    assert Predictions(f"{bucket}/p.jsonl").answers == {"docvqa": {"2": "b"}}


def test_records(bucket, gcs_proxy, tmp_path):
    """The client tries again for 15 minutes, except after a 403."""
    build_corpus(tmp_path / "docs", seed=1, sizes={"train": 3}, progress=False)
    file_system(bucket).put(f"{tmp_path}/docs/", f"{bucket}/docs/", recursive=True)
    source = open_dataset(f"{bucket}/docs", "train")
    gcs_proxy.fault = fault_proxy.forbidden
    with pytest.raises(TemporaryError, match="the bucket cannot be read now"):
        source[0]
    gcs_proxy.fault = fault_proxy.no_fault
    assert source[0]["id"]
