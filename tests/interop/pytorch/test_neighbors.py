"""The exported nano model in environments of other packages: TRL, PEFT, accelerate, the oldest transformers.

Only `make test-large` runs these tests: an environment takes minutes to install, and 2 GB.
"""

import importlib.metadata
import pathlib

import pytest

from alignvlm_jax.backbones import NANO_MODEL
from alignvlm_jax.interop.export import export_alignvlm
from alignvlm_jax.interop.import_pytorch import import_alignvlm
from tests.interop.pytorch.environments import environment, run_in

pytestmark = pytest.mark.large

_SCRIPT = pathlib.Path(__file__).with_name("neighbors.py")
# The small wheel for CPUs, where there is one.
_TORCH = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
_TRAINING = ["accelerate", "datasets", "peft", "pillow"]
_CHECKS = "generation resizing devices trainer adapters compiling".split()

ENVIRONMENTS = {
    "transformers-oldest": [_TORCH, "transformers==5.0.0", "accelerate", "peft", "pillow"],
    "trl-oldest": [_TORCH, "trl==1.0.0", "transformers>=5,<6", *_TRAINING],
    # The pipeline any-to-any needs torchvision.
    "trl-newest": [_TORCH, "trl>=1,<2", "transformers>=5,<6", "torchvision", *_TRAINING],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The trained nano model, exported."""
    root = tmp_path_factory.mktemp("neighbors")
    import_alignvlm(NANO_MODEL, root / "start")
    export_alignvlm(root / "start", root / "exported", dtype="float32")
    return root / "exported"


@pytest.mark.parametrize(
    ("name", "checks"),
    [
        ("transformers-oldest", _CHECKS),
        ("trl-oldest", ["sft"]),
        ("trl-newest", [*_CHECKS, "pipelines", "sft"]),
    ],
)
def test_neighbors_use_the_exported_model(folder, name, checks, tmp_path):
    """huggingface/trl#4184, #4066, huggingface/open-r1#404, huggingface/peft#2880, huggingface/transformers#36590."""
    python = environment(name, ENVIRONMENTS[name])
    output = run_in(python, _SCRIPT, folder, *checks, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert [line for line in output.splitlines() if line.startswith("ok")] == [f"ok {check}" for check in checks]
    # What LoRA has trained is merged, and comes back to JAX.
    for merged in folder.parent.glob("merged-*"):
        import_alignvlm(merged, tmp_path / merged.name)
