"""The notebooks of docs/tutorials/ run from top to bottom."""

import os
import pathlib
import subprocess

import jupytext
import nbclient

TUTORIALS = pathlib.Path(__file__).resolve().parents[2] / "docs" / "tutorials"


def execute(source: pathlib.Path, folder: pathlib.Path):
    """Returns the notebook with its outputs, executed with `folder` as its working directory."""
    notebook = jupytext.read(source)
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env={**os.environ, "JAX_PLATFORMS": "cpu"}, stderr=subprocess.DEVNULL)
    return notebook


def texts(notebook) -> list[str]:
    """Returns the outputs of all cells: text, else HTML, else the plain representation."""
    outputs = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            outputs.append(output.get("text") or data.get("text/html") or data["text/plain"])
    return outputs


def test_the_first_steps_notebook_runs(tmp_path):
    """The notebook loads a model, asks it, scores it, and shows the inspector inline."""
    image, answer, table, inspector = texts(execute(TUTORIALS / "first_steps.py", tmp_path))
    assert "PIL.Image" in image
    assert answer == "'26.59'"
    lines = table.splitlines()
    assert len(lines) == 4 and lines[1].split() == ["How", "much", "is", "the", "total?", "26.59", "right"]
    assert inspector.startswith("<div><iframe srcdoc=")
    assert "26.59" in inspector
    assert not list(tmp_path.iterdir())
