"""Lets the `alignvlm` command use huge pages for its arrays, on a Linux machine without accelerators.

XLA allocates the temporary arrays of a training step anew in each step, and the kernel then maps them page by page.
With pages of 2 MB instead of 4 kB, a step of the nano model takes a fifth less time. The C library asks for them if its
tunable `glibc.malloc.hugetlb` is 1, and reads its tunables only when a program starts. The command therefore sets the
variable and replaces itself by the same command (`exec`): process id, standard streams, folder and the rest of the
environment stay.

Only the command does so, never code that imports the library. It does not, if

- the variable already has this tunable, or the variable ALIGNVLM_HUGE_PAGES is 0;
- the kernel gives huge pages to all programs, or to none;
- a launcher has started it as one of several processes, or the machine has a TPU or GPU.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from alignvlm_jax.parallel.launchers import is_multi_host, unjoined_rank

SWITCH = "ALIGNVLM_HUGE_PAGES"
_TUNABLES, _TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Replaces this program by itself with huge pages, unless it has them or should not have them.

    Call it before anything is done.
    """
    environment = with_huge_pages(os.environ, huge_page_modes())
    command = same_command(sys.orig_argv, getattr(sys.modules["__main__"], "__file__", None))
    if environment is None or command is None:
        return
    try:
        os.execve(sys.executable, command, environment)
    except OSError:
        pass  # the program then runs with small pages


def with_huge_pages(environ: Mapping[str, str], modes: str) -> dict[str, str] | None:
    """Returns the environment of the restarted program; None if it should not be restarted.

    Args:
      environ: the environment.
      modes: the kernel's modes, such as "always [madvise] never". The tunable matters only under "madvise".
    """
    tunables = environ.get(_TUNABLES, "")
    if environ.get(SWITCH) == "0" or _TUNABLE in tunables or "[madvise]" not in modes:
        return None
    if (environ.get("JAX_PLATFORMS") or "cpu") != "cpu":
        return None
    if is_multi_host(environ) or unjoined_rank(environ):
        return None
    # The switch keeps a program from restarting again and again, if the C library drops its variable.
    tunables = f"{tunables}:{_TUNABLE}=1" if tunables else f"{_TUNABLE}=1"
    return {**environ, _TUNABLES: tunables, SWITCH: "0"}


def same_command(words: Sequence[str], main_file: str | None) -> list[str] | None:
    """Returns the command that runs `alignvlm` again; None if another program, such as a notebook, runs its code.

    Args:
      words: command line of the interpreter, with its own options.
      main_file: file of the main module.
    """
    is_script = main_file in words and Path(main_file).name == "alignvlm"
    is_module = ("-m", "alignvlm_jax") in zip(words, words[1:], strict=False)
    return [sys.executable, *words[1:]] if sys.executable and (is_script or is_module) else None


def huge_page_modes() -> str:
    """Returns the kernel's modes, with the one that applies in brackets; empty without huge pages."""
    try:
        return _MODES.read_text(encoding="ascii")
    except OSError:  # another system, or a kernel without huge pages
        return ""
