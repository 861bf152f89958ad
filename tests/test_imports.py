"""Tests of the structure of the package: imports point one way, and are at the top of their file."""

import ast
import pathlib
import subprocess
import sys

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "alignvlm_jax"

# Each command imports what it needs when it runs, so that `alignvlm --help` does not wait for jax. `alignvlm_jax.load`
# does the same. The files of interop/pytorch/ are copied next to exported models, and import each other there.
MAY_IMPORT_LATE = ("commands/", "cli.py", "__init__.py", "interop/pytorch/")


def test_packages_import_downwards_and_without_cycles():
    """Checks the contracts in pyproject.toml."""
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == EXIT_STATUS_SUCCESS


@pytest.mark.parametrize("bad_import", ["parallel.mesh -> training.loop", "ops.linear -> models.layers"])
def test_an_upward_import_is_reported(bad_import, tmp_path, capsys, monkeypatch):
    """Copies the package, adds one import that breaks the order, and checks that the contracts report it."""
    importer, imported = bad_import.split(" -> ")
    for file in PACKAGE.rglob("*.py"):
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    broken = tmp_path / "alignvlm_jax" / f"{importer.replace('.', '/')}.py"
    broken.write_text(f"{broken.read_text(encoding='utf-8')}\nimport alignvlm_jax.{imported}\n", encoding="utf-8")
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert f"alignvlm_jax.{importer} -> alignvlm_jax.{imported}" in " ".join(result.stdout.split())


def test_own_modules_are_imported_at_the_top_of_a_file():
    late = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if name.startswith(MAY_IMPORT_LATE):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                late += [f"{name}:{node.lineno}" for module in modules if module.split(".")[0] == "alignvlm_jax"]
    assert late == []
