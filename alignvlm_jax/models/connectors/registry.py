"""Registry of connectors. The rest of the package knows a connector only by its `ConnectorSpec`.

To add a connector, write a file with its settings, its module and its spec, and register the spec:

    @dataclasses.dataclass(frozen=True)
    class MeanConfig(ConnectorConfig):
        window: int = 2

    class MeanConnector(nn.Module): ...

    register(ConnectorSpec(name="mean", title="Mean", config=MeanConfig, module=MeanConnector, ...))

A config then selects it (`model.connector=mean`). Training, checkpoints, FLOP counts and conversion work as for the
other connectors. `tests/models/connectors/test_new_connector.py` shows a complete example.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from jaxtyping import Array

from alignvlm_jax.errors import UserError
from alignvlm_jax.models.flop_counts import TrainedParts
from alignvlm_jax.models.weight_table import Row


class ConnectorConfig:
    """Base class of the connectors' settings. Subclasses are frozen dataclasses."""


@dataclasses.dataclass(frozen=True)
class ConnectorShape:
    """Sizes of the model that a connector depends on.

    Attributes:
      grid_size: number of features along one side of a tile.
      source_width: d, the width of the encoder.
      output_width: D, the width of the decoder.
      vocab_size: V, the number of rows of the decoder's embedding table.
    """

    grid_size: int
    source_width: int
    output_width: int
    vocab_size: int

    @property
    def num_features(self) -> int:
        """N, the number of features of a tile."""
        return self.grid_size**2


@dataclasses.dataclass(frozen=True, eq=False)
class ConnectorSpec:
    """Everything that the package knows about one connector.

    The functions are called with the connector's config and the `ConnectorShape` of the model.

    Attributes:
      name: name in configs, such as "h_reducer".
      title: name in reports, such as "H-Reducer".
      description: noun phrase that describes the connector in a model card.
      config: dataclass of its settings.
      module: the Flax module, called as `module(config, output_size=D, dtype=dtype)`.
      token_grid: returns rows and columns of the visual tokens of one tile.
      flops: returns the FLOPs of one tile in a training step, given which parts are trained.
      weight_rows: returns the table of its weights, with paths and keys relative to the connector.
      is_spatial: whether each visual token has a position in its tile. The tiling rule anyres_max_9, which joins tiles
        at their edges, requires it.
      check: raises a `UserError` if the settings do not fit the shape; None accepts all settings.
      seeded: names of the parameters that `seed` returns.
      seed: returns the parameters that start from the language-model head [V, D] instead of random values.
      exact_dtypes: dtype of each parameter that is not stored in the dtype of the other weights.
      removed_settings: settings of earlier versions, each with the only value that old configs may still hold.
    """

    name: str
    title: str
    description: str
    config: type[ConnectorConfig]
    module: type[nn.Module]
    token_grid: Callable[[Any, ConnectorShape], tuple[int, int]]
    flops: Callable[[Any, ConnectorShape, TrainedParts], float]
    weight_rows: Callable[[Any, ConnectorShape], tuple[Row, ...]]
    is_spatial: bool = True
    check: Callable[[Any, ConnectorShape], None] | None = None
    seeded: tuple[str, ...] = ()
    seed: Callable[[Any, ConnectorShape, Array], dict[str, Array]] | None = None
    exact_dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    removed_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_SPECS: dict[str, ConnectorSpec] = {}


def register(spec: ConnectorSpec) -> None:
    """Registers a connector under its name.

    Raises:
      ValueError: if the name or the config class is registered already.
    """
    for other in _SPECS.values():
        if other.name == spec.name or other.config is spec.config:
            raise ValueError(f"connector {spec.name!r}: {other.name!r} is registered with this name or config class")
    _SPECS[spec.name] = spec


def unregister(name: str) -> None:
    """Undoes `register`."""
    del _SPECS[name]


def connector_names() -> tuple[str, ...]:
    """Returns the names of all registered connectors, in the order of registration."""
    return tuple(_SPECS)


def connector_named(name: str) -> ConnectorSpec:
    """Returns the connector that is registered under a name.

    Raises:
      UserError: if there is none.
    """
    if name not in _SPECS:
        raise UserError(f"connector {name!r}: expected one of {', '.join(_SPECS)}")
    return _SPECS[name]


def connector_spec(config: ConnectorConfig) -> ConnectorSpec:
    """Returns the connector that a config belongs to.

    Raises:
      ValueError: if its class is not registered.
    """
    for spec in _SPECS.values():
        if spec.config is type(config):
            return spec
    raise ValueError(
        f"{type(config).__name__} is not the config of a registered connector: expected one of {', '.join(_SPECS)}"
    )


def exact_dtypes() -> dict[str, str]:
    """Returns the `exact_dtypes` of all connectors together."""
    return {name: dtype for spec in _SPECS.values() for name, dtype in spec.exact_dtypes.items()}
