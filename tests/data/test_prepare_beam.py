"""The conversion in Apache Beam writes the same files, byte for byte. Only the large test installs Beam."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from alignvlm_jax.data.formats.checks import Limits
from alignvlm_jax.data.formats.conversation import FormatOptions
from alignvlm_jax.data.prepare import Recipe, in_processes, prepare
from alignvlm_jax.data.prepare_beam import in_beam
from alignvlm_jax.errors import UserError
from tests.data.formats.samples import write_input
from tests.data.test_prepare import PREPARE, contents

REPOSITORY = Path(__file__).parents[2]


def test_missing_beam_is_reported_with_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 'alignvlm-jax\[beam\]'"):
        in_beam(["--runner=DirectRunner"])


@pytest.mark.large
def test_the_direct_runner_writes_the_same(tmp_path):
    """Apache Beam is installed from the package index into a separate folder, because it requires an older protobuf."""
    requirement = re.search(r'"(apache-beam.*?)"', (REPOSITORY / "setup.py").read_text())[1]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", tmp_path / "beam", requirement]
    subprocess.run(install, check=True)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'beam'}:{REPOSITORY}"}

    file = write_input("llava", tmp_path, 40)
    options, limits = FormatOptions(records_per_shard=3), Limits(image_root=str(tmp_path / "images"))
    prepare(Recipe("llava", (str(file),), options=options, limits=limits), tmp_path / "whole", convert=in_processes(1))
    arguments = [*PREPARE, "--format", "llava", "--input", file, "--images", tmp_path / "images"]
    arguments += ["--records-per-shard", "3", "--runner", "DirectRunner", "--out"]
    two_processes = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    for name, more in {"one": [], "two": two_processes}.items():
        run = subprocess.run([*arguments, tmp_path / name, *more], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "40 of 40 records" in run.stdout
        assert contents(tmp_path / name) == contents(tmp_path / "whole")
