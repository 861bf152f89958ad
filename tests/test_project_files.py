"""Tests of the files around the code: workflows, CITATION.cff, README, and the links between Markdown files."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

import alignvlm_jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def check_schema(schema: str, *files: pathlib.Path) -> None:
    """Fails unless the files follow a schema that is built into check-jsonschema."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_follow_the_schema():
    assert [file.stem for file in WORKFLOWS] == ["lint", "release", "tests"]
    check_schema("vendor.github-workflows", *WORKFLOWS)


# lint.yml runs actionlint too. This test needs an installed one, because its package downloads a binary.
@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not installed")
def test_workflows_pass_actionlint():
    done = subprocess.run(["actionlint", *WORKFLOWS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_workflows_use_targets_of_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used_targets = set()
    for file in WORKFLOWS:
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            assert job["timeout-minutes"] <= 60
            used_targets |= set(re.findall(r"\bmake ([\w-]+)", " ".join(step.get("run", "") for step in job["steps"])))
    assert used_targets == {"lint", "docs", "test"} and used_targets <= targets


FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
  "-c ") ;;
  -c*) echo {version} ;;
  "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && rm -f .venv/.installed* ;;
esac
"""


def test_make_replaces_a_venv_of_another_python_only_if_asked_to(tmp_path):
    """A stamp that knew only setup.py kept a .venv of 3.11 for `make test PYTHON=python3.13`."""
    for name in ("Makefile", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    for version in ("3.11", "3.13"):
        file = tmp_path / f"python{version}"
        file.write_text(FAKE_PYTHON.format(version=version))
        file.chmod(0o755)

    # `make test PYTHON=...` passes its variables on to every make below it.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "PYTHON"}

    def make(*arguments):
        command = ["make", "install", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return subprocess.run(
            [tmp_path / ".venv/bin/python", "-c", "version"], capture_output=True, text=True
        ).stdout.strip()

    assert make("PYTHON=./python3.11") == "3.11"
    assert make("PYTHON=./python3.13") == "3.13"
    assert make() == "3.13", "without PYTHON, an existing .venv stays"


def test_the_citation_file_follows_the_schema_and_names_this_version():
    file = ROOT / "CITATION.cff"
    check_schema("vendor.citation-file-format", file)
    citation = yaml.safe_load(file.read_text())
    assert citation["version"] == alignvlm_jax.__version__
    assert citation["preferred-citation"]["url"] == "https://arxiv.org/abs/2502.01341"


def test_the_changelog_has_this_version_and_an_unreleased_section():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", alignvlm_jax.__version__]


def test_the_readme_is_short_and_begins_with_the_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    first_screen = "\n".join(lines[:40])
    assert "make test " in first_screen and "make demo " in first_screen and "](docs/architecture.svg)" in first_screen


def test_links_between_markdown_files_are_not_broken():
    missing = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        missing += [
            f"{page.relative_to(ROOT)}: {target}"
            for target in targets
            if "://" not in target and not (page.parent / target).exists()
        ]
    assert not missing
