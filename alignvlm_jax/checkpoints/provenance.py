"""Records what wrote a checkpoint: the versions of the libraries, and the revision of this code."""

import functools
import importlib.metadata
import subprocess
from pathlib import Path

import alignvlm_jax

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions in use: {"alignvlm_jax": ..., "jax": ..., ..., "git": "1a2b3c4+changes"}.

    "git" is present only if the code runs from a clone.
    """
    installed = {"alignvlm_jax": alignvlm_jax.__version__}
    installed |= {name: importlib.metadata.version(name) for name in _LIBRARIES}
    revision = git_revision()
    return installed | ({"git": revision} if revision else {})


def git_revision() -> str | None:
    """Returns the commit of this code, with "+changes" if files differ from it; None outside a clone."""
    root = Path(alignvlm_jax.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        git = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=10, check=True)
        revision = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changes = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{revision}+changes" if changes else revision
