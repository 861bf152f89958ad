"""Maps the named axes of weights and activations to axes of the mesh, by one table of rules.

Axis letters: K microbatches, B bins, L sequence, D model width, F MLP width, V vocabulary.

The models name the axes of their weights (`nn.with_logical_partitioning`) and of some activations
(`nn.with_logical_constraint`), and know nothing about meshes. This module turns the names into `PartitionSpec`s:

    language/embedding             [V, D]           ("vocab", "embed")            -> P("tensor", "fsdp")
    language/layers/mlp/down       [layers, F, D]   ("layers", "mlp", "embed")    -> P(None, "tensor", "fsdp")
    hidden states                  [B, L, D]        ("batch", "sequence", None)   -> P(("data", "fsdp"), None, None)
"""

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool

from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel.mesh import num_batch_shards

RULES = (
    ("batch", ("data", "fsdp")),
    ("sequence", None),
    ("embed", "fsdp"),
    ("embed_out", None),  # second axis of a [D, D] matrix, whose first axis ("embed") already uses fsdp
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("norm", None),
    ("patch", None),
    ("position", None),
)

BATCH_SPEC = PartitionSpec(None, ("data", "fsdp"))
"""Spec of every field of the packed batch [K, B, ...]: the bins are split, the microbatches are not."""


def logical_rules():
    """Returns a context manager in which the axis names of activations take effect while a model is traced."""
    return nn.logical_axis_rules(RULES)


def parameter_shardings(boxed_params: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each weight.

    Args:
      boxed_params: weights in the `nn.LogicallyPartitioned` boxes that the model's `init` returns; shapes suffice.
      mesh: mesh on which the weights are placed.

    Returns:
      `NamedSharding`s, in the tree of the weights without the boxes. An axis that the mesh does not divide evenly, such
      as a vocabulary of odd size, is not split.
    """
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed_params), mesh, RULES)
    return jax.tree.map(_drop_uneven_axes, shardings, nn.unbox(boxed_params))


def optimizer_state_shardings(state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Returns the shardings of an optimizer state: moments are sharded like their weights, counters are replicated.

    Args:
      state: the optimizer state; shapes suffice.
      params: the weights that the optimizer updates.
      shardings: shardings of the weights.
      mesh: mesh of the shardings.
    """
    weight_shardings = {}
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
    ):
        weight_shardings[path] = (leaf.shape, sharding)
    replicated = NamedSharding(mesh, PartitionSpec())

    def find(path, leaf):
        # However deeply Optax nests its states, a moment's path ends with the path of its weight:
        # `[1].mu['language']['embedding']`.
        endings = (weight_shardings.get(path[start:]) for start in range(len(path)))
        shape, sharding = next((ending for ending in endings if ending), (None, replicated))
        # Some optimizers keep a placeholder of another shape at the path of a weight.
        return sharding if shape == leaf.shape else replicated

    return jax.tree_util.tree_map_with_path(find, state)


def local_rows(mesh: Mesh, rows: int) -> tuple[int, ...]:
    """Returns the rows of a microbatch that this process builds: those on its devices, in order.

    The rows of a batch are split over `data` and `fsdp` only. Processes that differ only in their position along
    `tensor` hold, and build, the same rows.

    Args:
      mesh: mesh of the devices of all processes.
      rows: B, the bins of one microbatch.

    Raises:
      UserError: if the mesh does not divide the rows evenly.
    """
    _check_divides(mesh, rows)
    # Devices along `tensor` hold the same rows, hence the set.
    indices = NamedSharding(mesh, PartitionSpec(BATCH_SPEC[1])).addressable_devices_indices_map((rows,))
    return tuple(sorted({row for (piece,) in indices.values() for row in range(rows)[piece]}))


def is_first_holder(mesh: Mesh, rows: int) -> Bool[np.ndarray, " b"]:
    """Returns a mask of the `local_rows`: True for a row that no process with a lower index holds.

    Counting only these rows counts each row of the global batch once.
    """
    _check_divides(mesh, rows)
    # Index of the first process that holds each row.
    holder = np.full(rows, jax.process_count())
    for device, (piece,) in NamedSharding(mesh, PartitionSpec(BATCH_SPEC[1])).devices_indices_map((rows,)).items():
        holder[piece] = np.minimum(holder[piece], device.process_index)
    return holder[list(local_rows(mesh, rows))] == jax.process_index()


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places a packed batch on the mesh.

    Args:
      batch: fields [K, b, ...] with the rows of this process, in the order of `local_rows`; b is B if one process holds
        all devices.
      mesh: mesh of the devices of all processes.

    Returns:
      The global fields [K, B, ...], split over the devices by rows.
    """
    batch_sharding = NamedSharding(mesh, BATCH_SPEC)
    rows = _global_rows(mesh, len(next(iter(batch.values()))[0]))
    return {
        name: jax.make_array_from_process_local_data(batch_sharding, field, (len(field), rows, *field.shape[2:]))
        for name, field in batch.items()
    }


def shard_rows(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Splits the rows of fields [B, ...] over the mesh. Every process must pass the complete fields."""
    row_sharding = NamedSharding(mesh, PartitionSpec(BATCH_SPEC[1]))
    return {
        name: jax.make_array_from_callback(field.shape, row_sharding, field.__getitem__)
        for name, field in batch.items()
    }


def _check_divides(mesh: Mesh, rows: int) -> None:
    if rows % num_batch_shards(mesh):
        raise UserError(
            f"config.data.packing.bins_per_microbatch: expected a multiple of {num_batch_shards(mesh)} (the bins are "
            f"split over data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} devices), got {rows}"
        )


def _global_rows(mesh: Mesh, num_local: int) -> int:
    """Returns B, the rows of a microbatch of which this process holds `num_local`."""
    # All shards have the same number of rows, and `local_rows` of one row per shard are this process's shards.
    shards = num_batch_shards(mesh)
    return num_local * shards // len(local_rows(mesh, shards))


def _drop_uneven_axes(sharding: NamedSharding, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    """Returns the sharding without the mesh axes that do not divide the array axis that they are assigned to."""

    def keep(axes, size):
        names = (axes,) if isinstance(axes, str) else axes or ()
        return axes if size % math.prod(sharding.mesh.shape[name] for name in names) == 0 else None

    # A spec may be shorter than the shape; the axes that it lacks are not split.
    spec = tuple(sharding.spec) + (None,) * (len(leaf.shape) - len(sharding.spec))
    return NamedSharding(
        sharding.mesh, PartitionSpec(*(keep(axes, size) for axes, size in zip(spec, leaf.shape, strict=True)))
    )
