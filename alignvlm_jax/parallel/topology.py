"""TPU topologies that are not there: devices to compile for, on a machine without TPUs.

libtpu, which the extra `tpu` installs, holds the TPU compiler and can describe any slice; no chip is needed.
"""

import importlib.util
import os
import re
from collections.abc import Sequence

import jax

from alignvlm_jax.errors import UserError

# libtpu would look for the machine's TPU and its metadata server otherwise, and wait.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is taken, so several processes may compile
}


def topology_devices(name: str, *, slices: int = 1) -> Sequence[jax.Device]:
    """The devices of TPU slices, good for shardings and for compiling; nothing can be run on them.

    Args:
      name: generation and shape, such as "v5e:16x16", "v5p:4x4x4" or "v6e:8x8".
      slices: how many such slices, joined by the data-center network.

    Raises:
      UserError: there is no such topology, or no TPU compiler is installed.
    """
    if not re.fullmatch(r"\w+:\d+x\d+(x\d+)?", name):
        raise UserError(f"--topology {name}: expected a generation and a shape, such as v5e:16x16 or v5p:4x4x4")
    if not has_compiler():
        raise UserError("no TPU compiler is installed: pip install 'alignvlm-jax[tpu]'")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"--topology {name}: libtpu does not know it ({str(error).splitlines()[0]})") from error


def has_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None
