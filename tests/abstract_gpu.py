"""Lowers programs for a GPU on a machine without one."""

from jax.sharding import AbstractDevice, AbstractMesh, Mesh, use_abstract_mesh


def gpu_mesh(mesh: Mesh | None = None):
    """Returns a context in which the axes of a mesh (by default a single axis) consist of H100s that need not exist.

    JAX 0.11 lowers a Triton kernel only for a device that it knows, while 0.10 assumes an H100 where there is none.
    """
    gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    if mesh is None:
        return use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=gpu))
    return use_abstract_mesh(AbstractMesh(mesh.axis_sizes, mesh.axis_names, mesh.axis_types, abstract_device=gpu))
