"""Generation with candidates, and the classes that load an exported folder."""

import pytest
import torch
import transformers

from tests.interop.pytorch.folders import ask, random_image

NEVER = 351
ONE = ask("What is the total?", random_image(0, 30, 50))
SETTINGS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": NEVER}


@pytest.fixture
def repeated(pair):
    """Inputs whose last tokens also stand before the image, so that prompt lookup finds image tokens."""
    inputs = pair().inputs(ONE)
    ids = inputs["input_ids"]
    first = int((ids[0] == pair().model.config.image_token_id).nonzero()[0])
    inputs["input_ids"] = torch.cat([ids, ids[:, :first]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_prompt_lookup_proposes_no_image_tokens(pair, repeated, num_tokens):
    """StarsfieldAI/R1-V#91: an image token too many, and the counts of image tokens and features differ."""
    model = pair().model
    expected = model.generate(**repeated, **SETTINGS)
    assert torch.equal(model.generate(**repeated, **SETTINGS, prompt_lookup_num_tokens=num_tokens), expected)


@pytest.mark.parametrize("kind", ["itself", "connector of another width", "text only"])
def test_an_assistant_sees_images_through_its_own_encoder(pair, repeated, kind):
    """huggingface/transformers#35450, #37471: assisted decoding of vision-language models."""
    model = pair().model
    if kind == "itself":
        assistant = model
    elif kind == "text only":
        assistant = transformers.LlamaForCausalLM(model.config.text_config).eval()
        assistant.generation_config = model.generation_config
    else:
        config = type(model.config).from_dict(model.config.to_dict())
        config.text_config.hidden_size, config.text_config.num_hidden_layers = 16, 1
        assistant = type(model)(config).eval()
        assistant.generation_config = model.generation_config
    expected = model.generate(**repeated, **SETTINGS)
    assert torch.equal(model.generate(**repeated, **SETTINGS, assistant_model=assistant), expected)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_generation_continues_from_a_cache(pair):
    """The cache of a prompt, filled once, serves further calls; its name changed in transformers 5.24."""
    model, inputs = pair().model, pair().inputs(ONE)
    expected = model.generate(**inputs, **SETTINGS)
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    first = model.generate(**inputs, **{**SETTINGS, "max_new_tokens": 5}, past_key_values=cache)
    again = model.generate(first, **{**SETTINGS, "max_new_tokens": 7}, past_key_values=cache)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("name", ["AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM"])
def test_every_auto_class_that_tools_use_loads_the_model(pair, name):
    """huggingface/transformers#36926, #42032, om-ai-lab/VLM-R1#338: "Unrecognized configuration class".

    TRL and PEFT load a model of their own code by AutoModelForCausalLM.
    """
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = getattr(transformers, name).from_pretrained(pair().folder, trust_remote_code=True)
    assert type(model).__name__ == "AlignVLMForConditionalGeneration"
