"""The installed package: bounded dependencies, all modules and data files, and light imports."""

import os
import pathlib
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from unittest import mock

import pytest
from packaging.requirements import Requirement

from tests.built_package import build_package, copied_to_image

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "alignvlm_jax"


@pytest.fixture(scope="module")
def setup_arguments() -> dict:
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """The sdist and the wheel."""
    return build_package(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> pathlib.Path:
    """The files that the wheel puts into site-packages."""
    folder = tmp_path_factory.mktemp("installed") / "lib"
    zipfile.ZipFile(built[1]).extractall(folder)
    return folder


def run_installed(installed: pathlib.Path, *arguments: str) -> str:
    """Runs Python outside the clone, with the installed copy first on its path."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, *arguments], cwd=installed.parent, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_every_dependency_has_a_lower_and_an_upper_bound(setup_arguments):
    requirements = setup_arguments["install_requires"] + sum(setup_arguments["extras_require"].values(), [])
    for line in requirements:
        operators = {specifier.operator for specifier in Requirement(line).specifier}
        assert operators in ({">=", "<"}, {"=="}), f"{line} is not bounded on both sides"
    assert {"cpu", "tpu", "cuda", "torch", "dev"} <= setup_arguments["extras_require"].keys()


def test_every_extra_is_documented(setup_arguments):
    page = (ROOT / "docs" / "environments.md").read_text()
    rows = page[page.index("| Extra |") :].split("\n\n")[0]
    named = {name for row in rows.splitlines()[2:] for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    assert named == setup_arguments["extras_require"].keys()


def test_every_folder_with_code_is_a_package(setup_arguments):
    folders = {file.parent for file in PACKAGE.rglob("*.py") if "__pycache__" not in file.parts}
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(setup_arguments["packages"]) == expected | {"alignvlm_jax.configs"}


def test_the_wheel_has_the_files_of_the_package_and_no_others(installed):
    files = [file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    expected = {file.relative_to(ROOT).as_posix() for file in files}
    expected |= {f"alignvlm_jax/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    found = {file.relative_to(installed).as_posix() for file in installed.rglob("*") if file.is_file()}
    assert {name for name in found if ".dist-info/" not in name} == expected
    for name in ("py.typed", "configs/nano.py", "inspector/web/page.html", "interop/default_chat_template.jinja"):
        assert f"alignvlm_jax/{name}" in found
    for part in ("vision", "vision_transcription", "language", "model"):
        assert f"alignvlm_jax/backbones/nano/{part}/model.safetensors" in found


def test_the_sdist_has_what_the_wheel_is_built_from(built):
    """The wheel was built from it."""
    tops = {name.split("/")[1] for name in tarfile.open(built[0]).getnames() if "/" in name}
    assert tops == {*copied_to_image(), "PKG-INFO", "alignvlm_jax.egg-info", "setup.cfg"}


def test_the_installed_copy_runs_outside_the_clone(installed):
    path = run_installed(installed, "-c", "import alignvlm_jax; print(alignvlm_jax.__file__)")
    assert pathlib.Path(path.strip()).is_relative_to(installed)
    program = "from alignvlm_jax.config.loading import find_config; print(find_config('configs/nano.py'))"
    assert pathlib.Path(run_installed(installed, "-c", program).strip()).is_relative_to(installed)


def test_the_model_needs_only_jax_flax_and_optax(installed):
    """The model can be read and run on a machine without the other packages."""
    unwanted = ["grain", "tensorflow_datasets", "ml_collections", "orbax", "tokenizers", "PIL", "matplotlib", "torch"]
    program = f"""
import sys
for name in {unwanted}:
    sys.modules[name] = None  # Makes `import name` fail.
import alignvlm_jax.models.alignvlm, alignvlm_jax.ops
import alignvlm_jax.training.train_step, alignvlm_jax.inference.vocabulary
"""
    run_installed(installed, "-c", program)


def test_a_stored_answer_needs_neither_the_model_nor_its_packages(installed):
    """The start of a second `alignvlm ask` is little longer than that of JAX."""
    program = """
import sys
for name in ["flax", "optax", "orbax", "grain", "etils", "tensorflow_datasets", "ml_collections", "matplotlib"]:
    sys.modules[name] = None
import alignvlm_jax.inference.prepared, alignvlm_jax.backbones, alignvlm_jax.commands.ask, alignvlm_jax.data.images
"""
    run_installed(installed, "-c", program)


def test_help_does_not_import_jax(installed):
    program = """
import sys
import alignvlm_jax.cli
for words in (["--help"], *([command, "--help"] for command in alignvlm_jax.cli._parsers()[1])):
    try:
        alignvlm_jax.cli.main(words)
    except SystemExit as error:
        assert error.code == 0
assert "jax" not in sys.modules and "numpy" not in sys.modules
"""
    assert "examples:" in run_installed(installed, "-c", program)
