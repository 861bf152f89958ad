"""Connectors: from the encoder's features to the decoder's inputs, all behind one signature.

    connector(features [B, N, d], text_embedding [V, D]) -> ConnectorOutput(tokens [B, N', D], entropy [B, N'] | None)

B tiles, N features per tile, d encoder width, N' visual tokens per tile, D decoder width, V vocabulary.
`make_connector` turns a connector's config into its module; the type of the config selects the connector.
"""

import flax.linen as nn

from alignvlm_jax.models.connectors.align import AlignConfig, AlignConnector
from alignvlm_jax.models.connectors.c_abstractor import CAbstractorConfig, CAbstractorConnector
from alignvlm_jax.models.connectors.h_reducer import HReducerConfig, HReducerConnector
from alignvlm_jax.models.connectors.mlp import MLPConfig, MLPConnector
from alignvlm_jax.models.connectors.output import ConnectorOutput
from alignvlm_jax.models.connectors.ovis import OvisConfig, OvisConnector
from alignvlm_jax.models.connectors.perceiver import PerceiverConfig, PerceiverConnector

ConnectorConfig = AlignConfig | MLPConfig | PerceiverConfig | OvisConfig | HReducerConfig | CAbstractorConfig

CONNECTOR_CONFIGS: dict[str, type] = {
    "align": AlignConfig,
    "mlp": MLPConfig,
    "perceiver": PerceiverConfig,
    "ovis": OvisConfig,
    "h_reducer": HReducerConfig,
    "c_abstractor": CAbstractorConfig,
}

_MODULES: dict[type, type[nn.Module]] = {
    AlignConfig: AlignConnector,
    MLPConfig: MLPConnector,
    PerceiverConfig: PerceiverConnector,
    OvisConfig: OvisConnector,
    HReducerConfig: HReducerConnector,
    CAbstractorConfig: CAbstractorConnector,
}


def make_connector(config: ConnectorConfig, *, output_size: int, dtype: str, name: str | None = None) -> nn.Module:
    """Builds the connector that `config` describes.

    Args:
      config: one of the dataclasses in `CONNECTOR_CONFIGS`.
      output_size: D, the width of the decoder.
      dtype: dtype of the computation; parameters are float32.
      name: name of the submodule where the connector is called inside a compact method.
    """
    return _MODULES[type(config)](config, output_size=output_size, dtype=dtype, name=name)


__all__ = [
    "CONNECTOR_CONFIGS",
    "AlignConfig",
    "AlignConnector",
    "CAbstractorConfig",
    "CAbstractorConnector",
    "ConnectorConfig",
    "ConnectorOutput",
    "HReducerConfig",
    "HReducerConnector",
    "MLPConfig",
    "MLPConnector",
    "OvisConfig",
    "OvisConnector",
    "PerceiverConfig",
    "PerceiverConnector",
    "make_connector",
]
