"""Connectors, which map the encoder's features to inputs of the decoder. All have the same signature.

    connector(features [B, N, d], text_embedding [V, D]) -> ConnectorOutput(tokens [B, N', D], entropy [B, N'] | None)

B tiles, N features per tile, d encoder width, N' visual tokens per tile, D decoder width, V vocabulary.

Each connector is one file, which ends with its `SPEC`. `registry.py` documents the spec and how to add a connector.
"""

import flax.linen as nn

from alignvlm_jax.models.connectors import align, c_abstractor, h_reducer, mlp, ovis, perceiver
from alignvlm_jax.models.connectors.align import AlignConfig, AlignConnector
from alignvlm_jax.models.connectors.c_abstractor import CAbstractorConfig, CAbstractorConnector
from alignvlm_jax.models.connectors.h_reducer import HReducerConfig, HReducerConnector
from alignvlm_jax.models.connectors.mlp import MLPConfig, MLPConnector
from alignvlm_jax.models.connectors.output import ConnectorOutput
from alignvlm_jax.models.connectors.ovis import OvisConfig, OvisConnector
from alignvlm_jax.models.connectors.perceiver import PerceiverConfig, PerceiverConnector
from alignvlm_jax.models.connectors.registry import (
    ConnectorConfig,
    ConnectorShape,
    ConnectorSpec,
    connector_named,
    connector_names,
    connector_spec,
    exact_dtypes,
    register,
    unregister,
)

for _module in (align, mlp, perceiver, ovis, h_reducer, c_abstractor):
    register(_module.SPEC)


def make_connector(config: ConnectorConfig, *, output_size: int, dtype: str, name: str | None = None) -> nn.Module:
    """Returns the module of the connector that `config` describes.

    Args:
      config: settings of a registered connector.
      output_size: D, the width of the decoder.
      dtype: dtype of the computation; parameters are float32.
      name: name of the submodule if the connector is created inside a compact method.
    """
    return connector_spec(config).module(config, output_size=output_size, dtype=dtype, name=name)


__all__ = [
    "AlignConfig",
    "AlignConnector",
    "CAbstractorConfig",
    "CAbstractorConnector",
    "ConnectorConfig",
    "ConnectorOutput",
    "ConnectorShape",
    "ConnectorSpec",
    "HReducerConfig",
    "HReducerConnector",
    "MLPConfig",
    "MLPConnector",
    "OvisConfig",
    "OvisConnector",
    "PerceiverConfig",
    "PerceiverConnector",
    "connector_named",
    "connector_names",
    "connector_spec",
    "exact_dtypes",
    "make_connector",
    "register",
    "unregister",
]
