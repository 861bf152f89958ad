"""One table says on which axis of the mesh each named axis of a weight or an activation lies.

Axis letters: K microbatches, B bins, D model width, V vocabulary.

The models name the axes of their weights (`nn.with_logical_partitioning`) and of some activations
(`nn.with_logical_constraint`) and know nothing of meshes. Here the names become `PartitionSpec`s:

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
    ("embed_out", None),  # the other width of a width-to-width matrix: "embed" has taken fsdp already
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
    ("norm", None),
    ("patch", None),
    ("position", None),
)

BATCH_SPEC = PartitionSpec(None, ("data", "fsdp"))
"""Of every field of the packed batch: [K, B, ...], the microbatches one after the other, the bins spread."""


def logical_rules():
    """The context in which a model must be traced for the names of its activations to mean something."""
    return nn.logical_axis_rules(RULES)


def parameter_shardings(boxed_params: Any, mesh: Mesh) -> Any:
    """The sharding of each weight.

    Args:
      boxed_params: weights as the model's `init` makes them, in their `nn.LogicallyPartitioned` boxes (shapes suffice).
      mesh: where they will live.

    Returns:
      `NamedSharding`s, in the tree of the weights without the boxes. An axis that the mesh does not divide, say a
      vocabulary of odd size, stays whole.
    """
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed_params), mesh, RULES)
    return jax.tree.map(_keep_what_divides, shardings, nn.unbox(boxed_params))


def optimizer_state_shardings(state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of an optimizer's state: moments lie where their weights lie, counters are everywhere.

    Args:
      state: the optimizer's state (shapes suffice). Whatever it nests the moments in, a moment's path ends like the
        path of its weight: `[1].mu['language']['embedding']`.
      params: the weights the state is of.
      shardings: their shardings.
      mesh: of the shardings.
    """
    of_weight = {}
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
    ):
        of_weight[path] = (leaf.shape, sharding)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def find(path, leaf):
        endings = (of_weight.get(path[start:]) for start in range(len(path)))
        shape, sharding = next((found for found in endings if found), (None, everywhere))
        return sharding if shape == leaf.shape else everywhere

    return jax.tree_util.tree_map_with_path(find, state)


def local_rows(mesh: Mesh, rows: int) -> tuple[int, ...]:
    """The rows of a microbatch that this process makes: those its devices hold, in order.

    Rows of a batch are spread over `data` and `fsdp` alone. Processes that differ in `tensor` only hold, and make, the
    same rows.

    Args:
      mesh: of all processes' devices.
      rows: B, the bins of one microbatch.

    Raises:
      UserError: the mesh does not divide the rows.
    """
    _check_divides(mesh, rows)
    held = NamedSharding(mesh, PartitionSpec(BATCH_SPEC[1])).addressable_devices_indices_map((rows,))
    return tuple(sorted({row for (piece,) in held.values() for row in range(rows)[piece]}))


def is_first_holder(mesh: Mesh, rows: int) -> Bool[np.ndarray, " b"]:
    """Of the `local_rows`, those that no process of a lower number holds too: where each row is counted once."""
    _check_divides(mesh, rows)
    holder = np.full(rows, jax.process_count())
    for device, (piece,) in NamedSharding(mesh, PartitionSpec(BATCH_SPEC[1])).devices_indices_map((rows,)).items():
        holder[piece] = np.minimum(holder[piece], device.process_index)
    return holder[list(local_rows(mesh, rows))] == jax.process_index()


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a packed batch on the mesh.

    Args:
      batch: of every field the rows of this process, [K, b, ...], those that `local_rows` names: all B of them where
        one process holds all devices.
      mesh: of all processes' devices.

    Returns:
      The global fields [K, B, ...], each device with its rows.
    """
    where = NamedSharding(mesh, BATCH_SPEC)
    rows = _global_rows(mesh, len(next(iter(batch.values()))[0]))
    return {
        name: jax.make_array_from_process_local_data(where, field, (len(field), rows, *field.shape[2:]))
        for name, field in batch.items()
    }


def shard_rows(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Spreads the rows of fields [B, ...], which every process has whole, over the mesh."""
    where = NamedSharding(mesh, PartitionSpec(BATCH_SPEC[1]))
    return {
        name: jax.make_array_from_callback(field.shape, where, field.__getitem__) for name, field in batch.items()
    }


def _check_divides(mesh: Mesh, rows: int) -> None:
    if rows % num_batch_shards(mesh):
        raise UserError(
            f"config.data.packing.bins_per_microbatch: expected a multiple of {num_batch_shards(mesh)} (the bins are "
            f"spread over data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} devices), got {rows}"
        )


def _global_rows(mesh: Mesh, held: int) -> int:
    """The rows of a microbatch of which this process holds `held`: every piece is of one size."""
    shards = num_batch_shards(mesh)
    return held * shards // len(local_rows(mesh, shards))


def _keep_what_divides(sharding: NamedSharding, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    def keep(axes, size):
        names = (axes,) if isinstance(axes, str) else axes or ()
        return axes if size % math.prod(sharding.mesh.shape[name] for name in names) == 0 else None

    spec = tuple(sharding.spec) + (None,) * (len(leaf.shape) - len(sharding.spec))
    return NamedSharding(
        sharding.mesh, PartitionSpec(*(keep(axes, size) for axes, size in zip(spec, leaf.shape, strict=True)))
    )
