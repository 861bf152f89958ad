"""Describes TPU slices that are not attached, so that a machine without TPUs can compile for them.

libtpu, which the extra `tpu` installs, contains the TPU compiler and can describe any slice. It needs no chip.
"""

import importlib.util
import os
import re
from collections.abc import Sequence

import jax

from alignvlm_jax.errors import UserError

# Without these variables, libtpu searches for the machine's TPU and its metadata server, and waits for them.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is claimed, so several processes may compile at the same time
}


def topology_devices(name: str, *, slices: int = 1) -> Sequence[jax.Device]:
    """Returns the devices of TPU slices. They serve for shardings and compilation, but cannot run anything.

    Args:
      name: generation and shape of a slice, such as "v5e:16x16", "v5p:4x4x4", "v6e:8x8" or "tpu7x:4x4x4".
      slices: number of such slices, connected by the data-center network.

    Raises:
      UserError: if there is no such topology, or if no TPU compiler is installed.
    """
    if not re.fullmatch(r"\w+:\d+x\d+(x\d+)?", name):
        raise UserError(f"--topology {name}: expected a generation and a shape, such as v5e:16x16 or v5p:4x4x4")
    if not has_compiler():
        raise UserError("no TPU compiler is installed: pip install 'alignvlm-jax[tpu]'")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # Import late, because the environment variables must be set first.
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4:"):
        # The default describes each core of a v4 as a device, but JAX runs both cores of a chip as one.
        options["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"--topology {name}: unknown to libtpu ({str(error).splitlines()[0]})") from error


def has_compiler() -> bool:
    """Returns whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None
