"""MkDocs hooks for tutorials written as notebooks, and for links that point out of docs/.

A tutorial is a notebook in jupytext's percent format, docs/tutorials/NAME.py. It is executed while the site is built
and becomes the page tutorials/NAME.md, with the outputs of its cells. `mkdocs serve` skips the outputs, so that pages
reload quickly.
"""

import base64
import html
import itertools
import os
import pathlib
import re
import subprocess

import jupytext
import nbclient
from mkdocs.structure.files import File

# The outputs of all cells as HTML, by the number in their placeholder. They are inserted after Markdown has been
# rendered, because Markdown would break HTML that contains empty lines.
_outputs: dict[int, str] = {}
_numbers = itertools.count()
_is_executing = True


def on_startup(command, dirty):
    """Skips the outputs of notebooks while pages are edited."""
    global _is_executing
    _is_executing = command != "serve"


def on_files(files, config):
    """Adds a page for each notebook."""
    docs = pathlib.Path(config.docs_dir)
    for source in sorted(docs.glob("tutorials/*.py")):
        uri = source.relative_to(docs).with_suffix(".md").as_posix()
        files.append(File.generated(config, uri, content=_notebook_page(source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Makes links to notebooks point to their pages, and turns links to other source files into plain text."""
    markdown = re.sub(r"\]\(((?:tutorials/)?\w+)\.py\)", r"](\1.md)", markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./(?:alignvlm_jax|configs|tests|tools)[^)]*\)", r"\1", markdown)


def on_page_content(content, page, config, files):
    """Inserts the outputs of a notebook."""
    return re.sub(r'<div data-output="(\d+)"></div>', lambda match: _outputs[int(match[1])], content)


def _notebook_page(source: pathlib.Path) -> str:
    """Executes a notebook and returns it as Markdown, with a placeholder for each output."""
    notebook = jupytext.read(source)
    if _is_executing:
        client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3")
        client.execute(env={**os.environ, "JAX_PLATFORMS": "cpu"}, stderr=subprocess.DEVNULL)
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            number = next(_numbers)
            _outputs[number] = f'<div class="notebook-output">{_to_html(output)}</div>'
            parts.append(f'<div data-output="{number}"></div>')
    return "\n\n".join(parts) + "\n"


def _to_html(output) -> str:
    """Returns the richest form of an output."""
    if output.output_type == "stream":
        return f"<pre>{html.escape(output.text)}</pre>"
    data = output.data
    if "text/html" in data:
        return data["text/html"]
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            # Encode again, because the base64 text of a notebook contains line breaks.
            encoded = base64.b64encode(base64.b64decode(data[kind])).decode()
            return f'<img alt="output" src="data:{kind};base64,{encoded}">'
    return f"<pre>{html.escape(data['text/plain'])}</pre>"
