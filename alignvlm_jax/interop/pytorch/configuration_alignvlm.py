"""AlignVLM model configuration: a SigLIP encoder, a connector, and a Llama decoder.

Example of `config.json` in an exported folder. `connector_config` contains the connector's name and the fields of its
dataclass in `alignvlm_jax.models.connectors`, with null for None:

    {
      "model_type": "alignvlm",
      "architectures": ["AlignVLMForConditionalGeneration"],
      "auto_map": {
        "AutoConfig": "configuration_alignvlm.AlignVLMConfig",
        "AutoModel": "modeling_alignvlm.AlignVLMModel",
        "AutoModelForImageTextToText": "modeling_alignvlm.AlignVLMForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_alignvlm.AlignVLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_alignvlm.AlignVLMForConditionalGeneration",
        "AutoProcessor": "processing_alignvlm.AlignVLMProcessor",
        "AutoImageProcessor": "image_processing_alignvlm.AlignVLMImageProcessor"
      },
      "vision_config": {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14, ...},
      "text_config": {"model_type": "llama", "vocab_size": 128256, "rope_parameters": {...}, ...},
      "connector_config": {"name": "align", "vocab_scale_init": 2.0, "use_bias": true, "layer_norm_eps": 1e-05,
                           "vocab_size": null, "kept_words": null},
      "newline": false,
      "image_token_id": 128011,
      "tie_word_embeddings": true,
      "bos_token_id": 128000, "eos_token_id": [128009, 128001], "pad_token_id": 128004,
      "dtype": "bfloat16"
    }

The other connectors: {"name": "mlp"}, {"name": "ovis", "num_words", "layer_norm_eps"}, {"name": "h_reducer", "window"},
{"name": "c_abstractor", "num_tokens", "depth", "hidden_size"},
{"name": "perceiver", "num_latents", "depth", "num_heads", "num_kv_heads", "head_dim", "intermediate_size",
"rms_norm_eps"}.

transformers finds the classes of this folder through `auto_map`. `processing_alignvlm.py` describes
`processor_config.json`.
"""

import math

from transformers import LlamaConfig, PretrainedConfig, SiglipVisionConfig


class AlignVLMConfig(PretrainedConfig):
    """Configuration of an AlignVLM.

    Args:
        vision_config: a `SiglipVisionConfig` or its dict.
        text_config: a `LlamaConfig` or its dict.
        connector_config: name and fields of the connector; see the module docstring.
        newline: whether a learned vector ends every row of visual tokens, as under the tiling rule anyres_max_9.
        image_token_id: id of the image token, which the processor repeats once per visual token.
        tie_word_embeddings: whether the language-model head is tied to the embedding table.
    """

    model_type = "alignvlm"
    sub_configs = {"vision_config": SiglipVisionConfig, "text_config": LlamaConfig}

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        connector_config=None,
        newline=False,
        image_token_id=0,
        tie_word_embeddings=True,
        **kwargs,
    ):
        if not isinstance(vision_config, SiglipVisionConfig):
            vision_config = SiglipVisionConfig(**{"vision_use_head": False, **(vision_config or {})})
        if not isinstance(text_config, LlamaConfig):
            text_config = LlamaConfig(**(text_config or {}))
        # The decoder's own config must agree with this one.
        text_config.tie_word_embeddings = tie_word_embeddings
        self.vision_config = vision_config
        self.text_config = text_config
        self.connector_config = dict(connector_config or {"name": "align"})
        # Folders exported by earlier versions hold the key of an option that has since been removed.
        if removed := self.connector_config.pop("num_extra_words", 0):
            raise ValueError(f"connector_config: num_extra_words was removed, expected 0, got {removed}")
        self.newline = newline
        self.image_token_id = image_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def tokens_per_tile(self) -> int:
        """Number of visual tokens per tile, after the connector."""
        grid = self.vision_config.image_size // self.vision_config.patch_size
        if self.connector_config["name"] == "perceiver":
            return self.connector_config["num_latents"]
        if self.connector_config["name"] == "c_abstractor":
            return self.connector_config["num_tokens"]
        if self.connector_config["name"] == "h_reducer":
            return grid * math.ceil(grid / self.connector_config["window"])
        return grid * grid


__all__ = ["AlignVLMConfig"]
