"""Does to the exported model what vLLM's Transformers backend does, and runs the decoder alone on embeddings."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alignvlm_jax.inference.generate import Generator
from alignvlm_jax.inference.prompt_embeds import prompt_embeds
from alignvlm_jax.interop.huggingface import save_language_folder
from tests.interop.pytorch.folders import CONNECTORS, ask, random_image, relative_error

TOLERANCE = 1e-4
QUESTION = ask("What is the total?", random_image(0, 30, 50), random_image(1, 20, 10))


def load_base(pair) -> nn.Module:
    """Loads the base model through AutoModel, as vLLM does."""
    model = transformers.AutoModel.from_pretrained(pair.folder, trust_remote_code=True)
    assert type(model).__name__ == "AlignVLMModel"
    return model.eval()


def merge_images(model, inputs) -> torch.Tensor:
    """Encodes the images of a request and inserts them into the text embeddings, as vLLM does."""
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    # The images of `QUESTION` have five tiles and one.
    visual = torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in features.split([5, 1])])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[inputs["input_ids"] == model.config.image_token_id] = visual
    return embeds


def test_the_base_model_has_the_attributes_that_vllm_reads(pair):
    pair = pair()
    config = transformers.AutoConfig.from_pretrained(pair.folder, trust_remote_code=True)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config, trust_remote_code=True)
    assert type(model).is_backend_compatible()
    assert model._supports_attention_backend
    assert config.get_text_config() is config.text_config is not config
    assert type(model.get_decoder()).__name__ == "LlamaModel"
    assert type(model.get_encoder(modality="image")).__name__ == "AlignVLMVisionTower"
    plan = model.tp_plan
    assert plan["language_model.layers.*.self_attn.q_proj"] and plan["language_model.layers.*.mlp.down_proj"]
    assert model.base_model_prefix == "model" and config.tie_word_embeddings
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_attention_of_the_decoder_can_be_replaced(pair, monkeypatch):
    """The engine's attention function gets its state through keyword arguments, which the model must pass on."""
    pair = pair()
    model, inputs = load_base(pair), pair.inputs(QUESTION)
    instances = []

    def engine(module, query, key, value, attention_mask, attention_instances, **kwargs):
        instances.append(attention_instances[module.layer_idx])
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    with torch.no_grad():
        expected = pair.model.model(**inputs).last_hidden_state
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "engine", engine)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "engine", lambda *args, **kwargs: None)
    model.config.get_text_config()._attn_implementation = "engine"
    with torch.no_grad():
        embeds = merge_images(model, inputs)
        outputs = model(
            input_ids=None,
            inputs_embeds=embeds,
            use_cache=False,
            position_ids=torch.arange(embeds.shape[1])[None],
            attention_instances={0: "a", 1: "b", 2: "c"},
            return_dict=False,
        )
    assert instances == ["a", "b", "c"] and isinstance(outputs, tuple)
    assert relative_error(outputs[0], expected) < TOLERANCE


class OpaqueLayer(nn.Module):
    """Stands for a layer of the engine (sharded, quantized) that can be called, but whose weight cannot be read."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self._layer = [layer]  # In a list, it is not registered as a submodule.

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._layer[0](inputs)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_layers_can_be_replaced(pair, connector):
    """Linear, Conv2d and embedding layers are only called; their weights are never read."""
    pair = pair(connector, tied=connector != "mlp")
    model, inputs = load_base(pair), pair.inputs(QUESTION)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        model.set_input_embeddings(OpaqueLayer(model.get_input_embeddings()))
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                # SigLIP reads the dtype of its patch embedding, which layers of the engine provide as well.
                if isinstance(child, nn.Linear) or isinstance(child, nn.Conv2d) and name != "patch_embedding":
                    setattr(module, name, OpaqueLayer(child))
        assert torch.equal(model(**inputs).last_hidden_state, expected)


def test_modules_are_not_arguments_of_modules(pair):
    """The offloading hooks of accelerate move every argument that has `to`, so modules must not be arguments."""
    pair = pair()
    model, inputs = load_base(pair), pair.inputs(QUESTION)
    called = []

    def check_arguments(module, args, kwargs):
        called.append(module)
        assert not any(hasattr(value, "to") for value in (*args, *kwargs.values()) if not torch.is_tensor(value))

    for module in model.connector.modules():
        module.register_forward_pre_hook(check_arguments, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    assert set(called) == set(model.connector.modules())


def test_align_uses_the_current_embedding_table(pair):
    pair = pair()
    model, inputs = load_base(pair), pair.inputs(QUESTION)
    with torch.no_grad():
        before = model.get_image_features(inputs["pixel_values"]).pooler_output
        table = model.get_input_embeddings()
        table.weight[330:] += 1.0  # rows of special tokens, beyond the connector's vocabulary
        assert torch.equal(model.get_image_features(inputs["pixel_values"]).pooler_output, before)
        table.weight[:330] += 1.0
        after = model.get_image_features(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(after, before + 1.0)  # The probabilities sum to one.


@pytest.mark.parametrize("connector", ["align", "perceiver", "h_reducer"])
def test_shapes_do_not_depend_on_data(pair, connector):
    """Encoder and connector compile to one graph without breaks, for any number of tiles."""
    model = load_base(pair(connector, tied=connector != "mlp"))

    def encode(pixel_values):
        return model.get_image_features(pixel_values).pooler_output

    torch._dynamo.reset()
    compiled = torch.compile(encode, backend="eager", fullgraph=True)
    with torch.no_grad():
        for tiles in (2, 3):
            pixels = torch.randn(tiles, 3, 20, 20)
            torch.testing.assert_close(compiled(pixels), encode(pixels))


def test_the_decoder_alone_generates_from_embeddings(pair, tmp_path):
    """Encoder and connector run in JAX, and the decoder in PyTorch generates the same 32 tokens."""
    pair = pair("align", tied=False)
    save_language_folder(tmp_path / "llama", pair.config.language, pair.params["language"], "float32")
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    prompts = pair.prompts(QUESTION, ask("Read the page."))
    generator = Generator(pair.config, pair.params, end_ids=[351], pad_id=pair.chat.pad_id, batch_size=2)
    embeddings = prompt_embeds(generator, prompts)
    for prompt, embeds, expected in zip(prompts, embeddings, generator.generate(prompts, 32), strict=True):
        assert embeds.shape == (len(prompt.tokens), 32) and embeds.dtype == np.float32
        embeds = torch.tensor(embeds)[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        answer = llama.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=32, do_sample=False, eos_token_id=351
        )
        np.testing.assert_array_equal(answer[0], expected)
