"""Describes NVIDIA GPUs that are not attached, so that a machine without one can compile for them.

JAX's CUDA plugin contains XLA's compiler for CUDA. It runs without a GPU and without a driver, given a description of
the GPU and the assembler `ptxas`. `make test-cuda` installs the three packages into a folder of their own,
`build/cuda-compiler`: in the environment itself, JAX would look for a GPU at every start.

    devices = gpu_devices("h100", "build/cuda-compiler")
    jax.jit(step, in_shardings=SingleDeviceSharding(devices[0])).lower(*shapes).compile().memory_analysis()

The compiler has no GPU to measure on, so it chooses the tiles of matrix products by rules, not by autotuning. A run
therefore may need more or less workspace for its products.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import jax
from jaxlib import xla_client

from alignvlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """Properties of a GPU that the compiler needs. Sources: NVIDIA's white papers of the A100 and the H100."""

    device_kind: str
    capability: tuple[int, int]
    cores: int  # multiprocessors
    float_units: int  # per multiprocessor
    shared_memory: int  # of a multiprocessor; a block can use all but 1 KiB
    l2_cache: int
    memory: int
    bandwidth: float
    clock_ghz: float

    def text(self) -> str:
        """Returns the description as a `GpuTargetConfigProto` in text format."""
        major, minor = self.capability
        # Hopper's own instructions.
        features = "feature_extension: ACCELERATED_FEATURES" if self.capability >= (9, 0) else ""
        return f"""
            gpu_device_info {{
              name: "{self.device_kind}"
              device_vendor: "NVIDIA Corporation"
              cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
              core_count: {self.cores}
              fpus_per_core: {self.float_units}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.bandwidth:.0f}
              l2_cache_size: {self.l2_cache}
              shared_memory_per_core: {self.shared_memory}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_memory - 1024}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              threads_per_warp: 32
              threads_per_core_limit: 2048
              threads_per_block_limit: 1024
              thread_dim_limit_x: 1024
              thread_dim_limit_y: 1024
              thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              device_address_bits: 64
              driver_version: "13.0.0"
              runtime_version: "12.8.0"
              compile_time_toolkit_version: "12.8.0"
              dnn_version: "9.10.0"
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.device_kind}"
        """


_KIB, _MIB = 2**10, 2**20
_GPUS = {
    "a100": _Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 * _KIB, 40 * _MIB, 80 * 2**30, bandwidth=2039e9, clock_ghz=1.41
    ),
    "h100": _Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 * _KIB, 50 * _MIB, 80 * 2**30, bandwidth=3350e9, clock_ghz=1.98
    ),
}


def gpu_devices(name: str, packages: str | os.PathLike[str], *, count: int = 1) -> Sequence[jax.Device]:
    """Returns GPUs of one machine. They serve for shardings and compilation, but cannot run anything.

    Args:
      name: "a100" or "h100", with 80 GB.
      packages: folder into which the packages jax-cuda12-pjrt, jax-cuda12-plugin (of the version of jaxlib) and
        nvidia-cuda-nvcc-cu12 are installed. It must be the same for all calls of a process.
      count: number of GPUs.

    Raises:
      UserError: if the GPU is unknown, or a package is missing.
    """
    if name not in _GPUS:
        raise UserError(f"{name} is not a known GPU: expected one of {', '.join(_GPUS)}")
    api = _load_compiler(Path(packages).absolute())
    topology = xla_client.make_c_api_device_topology(
        api, name, topology=f"1x1x{count}", target_config=_GPUS[name].text()
    )
    return topology._make_compile_only_devices()


@functools.cache
def _load_compiler(packages: Path):
    """Loads JAX's CUDA plugin from a folder of packages, without a GPU."""
    plugin = packages / "jax_plugins/xla_cuda12/xla_cuda_plugin.so"
    mosaic, toolkit = packages / "jax_cuda12_plugin/libmosaic_gpu_runtime.so", packages / "nvidia/cuda_nvcc"
    for path in (plugin, mosaic, toolkit):
        if not path.exists():
            raise UserError(f"{packages} has no CUDA compiler ({path.name} is missing): run `make test-cuda`")
    # The plugin reads both variables when it compiles its first program.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={toolkit}"
    os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(mosaic)
    api = xla_client.load_pjrt_plugin_dynamically("cuda", str(plugin))
    xla_client.initialize_pjrt_plugin("cuda")
    return api
