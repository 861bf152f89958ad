"""The shipped configs at full size, in shapes only, compared with transformers' models on the device "meta"."""

import math

import flax.linen as nn
import jax
import pytest
import torch
import transformers

from alignvlm_jax.config import load_config
from alignvlm_jax.config.stages import StageConfig
from alignvlm_jax.data.resampling import max_visual_tokens
from alignvlm_jax.interop.huggingface_config import llama_config, siglip_config
from alignvlm_jax.models.alignvlm import AlignVLM, example_batch, parameter_shapes, token_grid

# Parameter counts of the language models, from their model cards. A tied LM head is counted once.
PUBLISHED = {
    "alignvlm_1b": 1_235_814_400,
    "alignvlm_3b": 3_212_749_824,
    "alignvlm_8b": 8_030_261_248,
    "debug_gpu": 134_515_008,
    "low_resource_3b": 3_212_749_824,
}
# Global batch sizes and learning rates of the three stages, from the paper's table.
PAPER = {
    "alignvlm_1b": ((512, 512, 512), (1e-5, 5e-5, 5e-5)),
    "alignvlm_3b": ((512, 256, 256), (1e-5, 5e-5, 5e-5)),
    "alignvlm_8b": ((512, 256, 256), (1e-5, 1e-5, 1e-5)),
}


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module", params=sorted(PUBLISHED))
def shipped(request):
    """Name, config, and shapes of the weights."""
    config = load_config(f"configs/{request.param}.py")
    return request.param, config, nn.unbox(parameter_shapes(config.model))


def test_parameter_counts_match_hugging_face(shipped):
    name, config, params = shipped
    with torch.device("meta"):
        raw = llama_config(config.model.language, "bfloat16")
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(raw))
        siglip = transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig.from_dict(siglip_config(config.model.vision, "bfloat16"))
        )
    llama_parameters = {parameter for parameter in llama.parameters()}  # tied weights are one parameter
    assert count(params["language"]) == sum(parameter.numel() for parameter in llama_parameters) == PUBLISHED[name]
    assert count(params["vision"]) == sum(parameter.numel() for parameter in siglip.parameters())
    width, words = config.model.language.hidden_size, config.model.language.vocab_size
    # W1 and its bias, scale and bias of the norm, W2, scale and bias over the vocabulary.
    align = config.model.vision.hidden_size * width + width + 2 * width + words * width + 2 * words
    assert count(params["connector"]) == align + (width if config.model.newline else 0)


def test_a_full_bin_passes_through_the_model(shipped):
    _, config, params = shipped
    packing = config.data.packing
    batch = example_batch(config.model, rows=1, tiles=packing.tiles_per_bin, length=packing.tokens_per_bin)
    output = jax.eval_shape(lambda params: AlignVLM(config.model).apply({"params": params}, batch), params)
    assert output.logits.shape == (1, packing.tokens_per_bin, config.model.language.vocab_size)
    # The largest image and the longest text of a stage fit into one bin together.
    longest = max(stage.max_text_tokens for stage in config.stages)
    image = max_visual_tokens(config.data.tiling, token_grid(config.model))
    assert packing.tokens_per_bin >= image + longest and packing.tiles_per_bin >= config.data.tiling.max_tiles_per_image


@pytest.mark.parametrize("name", sorted(PAPER))
def test_the_three_stages_match_the_paper(name):
    stages: tuple[StageConfig, ...] = load_config(f"configs/{name}.py").stages
    batches, rates = PAPER[name]
    assert tuple(stage.global_batch for stage in stages) == batches
    for stage, rate in zip(stages, rates, strict=True):
        assert {stage.learning_rates.vision, stage.learning_rates.connector, stage.learning_rates.language} == {rate}
    assert [stage.trainable for stage in stages] == [
        ("vision", "connector", "language"),
        ("vision", "connector", "language"),
        ("connector", "language"),
    ]
    assert [stage.max_text_tokens for stage in stages] == [1024, 2048, 2048]
    assert [stage.epochs for stage in stages] == [1, 1, 5]


def test_the_low_resource_stages_match_the_paper():
    config = load_config("configs/low_resource_3b.py")
    first, second = config.stages
    assert first.trainable == ("connector",) and first.learning_rates.connector == 1e-3
    assert set(second.trainable) == {"vision", "connector", "language"}
    rates = second.learning_rates
    assert (rates.vision, rates.connector, rates.language) == (2e-6, 1e-5, 1e-5)
    assert config.data.tiling.rule == "anyres_max_9" and first.epochs == second.epochs == 1


@pytest.mark.parametrize("connector", ["align", "mlp", "ovis", "h_reducer", "c_abstractor", "perceiver"])
def test_every_row_of_the_low_resource_table_has_a_config(connector):
    """Traces each config at full size with an image of the largest allowed size."""
    # The Perceiver's latents have no positions in a tile, so it cannot join tiles as anyres_max_9 does.
    changes = ["data.tiling.rule=ovis"] if connector == "perceiver" else []
    config = load_config("configs/low_resource_3b.py", [f"model.connector={connector}", *changes])
    tiles = config.data.tiling.max_tiles_per_image
    length = max_visual_tokens(config.data.tiling, token_grid(config.model)) + 8
    params = nn.unbox(parameter_shapes(config.model))
    batch = example_batch(config.model, rows=1, tiles=tiles, length=length)
    output = jax.eval_shape(lambda params: AlignVLM(config.model).apply({"params": params}, batch), params)
    assert output.logits.shape == (1, length, config.model.language.vocab_size)
