"""Folders as downloads and trainings leave them: each is imported as transformers would read it, or refused by name.

Every folder is the nano language model with one change. The docstrings name the reports that the changes come from.
"""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from alignvlm_jax.backbones import backbone_folder
from alignvlm_jax.downloads.hub_cache import model_name
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.reader import load
from alignvlm_jax.interop import huggingface
from alignvlm_jax.interop.tensor_reader import TensorFiles
from alignvlm_jax.interop.tokenizer import import_tokenizer

NANO = backbone_folder("language", "nano")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 1710288\n"
HTML = "<!doctype html>\n<html class=''><head><title>Hugging Face</title></head></html>"
TENSORS = safetensors.numpy.load_file(NANO / "model.safetensors")
ROWS = 512


@pytest.fixture
def folder(tmp_path):
    """A copy of the nano language folder."""
    return shutil.copytree(NANO, tmp_path / "Llama-nano")


def edit(path, **changes):
    """Changes entries of a JSON file; None removes an entry."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def save(folder, tensors, name="model.safetensors"):
    safetensors.numpy.save_file(tensors, folder / name, {"format": "pt"})


def shard(folder, total=2, index=True):
    """Replaces the weights by shards; returns their names."""
    (folder / "model.safetensors").unlink()
    names = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    keys = sorted(TENSORS)
    for i, name in enumerate(names):
        save(folder, {key: TENSORS[key] for key in keys[i::total]}, name)
    if index:
        weight_map = {key: names[i % total] for i, key in enumerate(keys)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names


def read(folder, key="model.norm.weight"):
    """Returns a tensor as the reader of language models finds it."""
    with huggingface.open_language(folder) as backbone:
        return next(
            np.array(backbone.files.read(name)) for name in backbone.files.shapes if backbone.rename(name) == key
        )


def assert_same_model(folder):
    config, params = huggingface.load_language_folder(folder)
    expected_config, expected = huggingface.load_language_folder(NANO)
    assert config == expected_config
    np.testing.assert_array_equal(params["embedding"], expected["embedding"])
    np.testing.assert_array_equal(
        params["layers"]["mlp"]["gate"]["kernel"], expected["layers"]["mlp"]["gate"]["kernel"]
    )


def refusal(read, *arguments, **options):
    with pytest.raises(UserError) as error:
        read(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Links.


def test_shards_that_are_links_to_another_disk_are_read(folder, tmp_path):
    """huggingface_hub#2203, #1738: `download --local-dir` left links into the cache for a year."""
    (tmp_path / "blobs").mkdir()
    for number, name in enumerate(shard(folder)):
        (folder / name).rename(tmp_path / "blobs" / str(number))
        (folder / name).symlink_to(tmp_path / "blobs" / str(number))
    assert_same_model(folder)


def test_a_link_without_a_target_is_named(folder):
    """huggingface_hub#1738: a folder of links was copied to a machine without the cache."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/4d7a2146")
    message = refusal(TensorFiles, folder)
    assert "model.safetensors is a link to ../../blobs/4d7a2146, which does not exist" in message
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../../blobs/4d7a2147")
    assert "config.json is a link to ../../blobs/4d7a2147" in refusal(backbone_folder, "language", str(folder))


def test_the_folder_of_a_model_in_the_hub_cache_stands_for_its_revision(tmp_path):
    """huggingface_hub's cache: models--org--name/{refs,blobs,snapshots/REVISION}; users copy any of these paths."""
    root = tmp_path / "models--org--Llama-nano"
    snapshots = root / "snapshots"
    for revision in ("aaa", "bbb"):
        shutil.copytree(NANO, snapshots / revision)
    assert "2 revisions" in refusal(backbone_folder, "language", str(root))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("bbb")
    for path in (root, snapshots, snapshots / "bbb"):
        assert backbone_folder("language", str(path)) == snapshots / "bbb"
        assert model_name(path) == "org/Llama-nano"
    assert "models--org--Llama-nano" in refusal(backbone_folder, "language", str(tmp_path))
    assert "not in the cache, and HF_HUB_OFFLINE is set" in refusal(backbone_folder, "language", "org/Llama-nano")


# Two sets of weights.


def test_the_single_file_is_read_and_both_sets_are_named(folder):
    """lerobot#826, diffusers#14769: model.safetensors of an earlier save next to an index with its shards."""
    shard(folder)
    save(folder, {key: (tensor * 0.5).astype(tensor.dtype) for key, tensor in TENSORS.items()})
    with TensorFiles(folder) as files:
        np.testing.assert_array_equal(files.read("model.norm.weight"), TENSORS["model.norm.weight"] * 0.5)
        (note,) = files.notes
    assert "two sets of weights: model.safetensors is read" in note
    assert "model.safetensors.index.json" in note and "model-00001-of-00002.safetensors" in note


@pytest.mark.parametrize("other", ["consolidated.safetensors", "pytorch_model.bin", "model.fp16.safetensors"])
def test_weights_that_transformers_does_not_read_are_named(folder, other):
    """mlx-vlm#1464: a stray file next to the shards that the index names must not be read."""
    shard(folder)
    save(folder, {"stray": np.zeros(3, np.float32)}, other)
    with TensorFiles(folder) as files:
        assert set(files.shapes) == set(TENSORS)
        assert other in files.notes[0] and "2 files named by model.safetensors.index.json are read" in files.notes[0]
    (folder / other).unlink()
    assert TensorFiles(folder).notes == ()


def test_the_config_may_name_the_weights(folder):
    """transformers 5: `transformers_weights` of config.json comes before all other files."""
    save(folder, TENSORS, "consolidated.safetensors")
    (folder / "model.safetensors").write_bytes(b"not read")
    edit(folder / "config.json", transformers_weights="consolidated.safetensors")
    assert_same_model(folder)
    edit(folder / "config.json", transformers_weights="../other/model.safetensors")
    assert "points outside the folder" in refusal(TensorFiles, folder)


def test_shards_without_an_index_are_read_if_they_are_complete(folder):
    """xotorch#11: `hf download --include '*.safetensors'` leaves out the index."""
    names = shard(folder, total=3, index=False)
    assert_same_model(folder)
    assert "there is no model.safetensors.index.json: all 3 shards" in TensorFiles(folder).notes[0]
    (folder / names[1]).unlink()
    assert "it has 2 of 3 shards, without model-00002-of-00003.safetensors" in refusal(TensorFiles, folder)


def test_missing_shards_are_named_with_what_to_do(folder):
    """sglang#32279: a stopped download; CoSER#3, mlx-vlm#1827: the index of an earlier save with other shards."""
    first, second = shard(folder)
    (folder / second).unlink()
    message = refusal(TensorFiles, folder)
    assert f"{second} is missing, which model.safetensors.index.json names: download the rest" in message
    unfinished = folder / ".cache" / "huggingface" / "download" / "x.incomplete"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_text("")
    assert "a download did not finish (x.incomplete): run it again" in refusal(TensorFiles, folder)
    unfinished.unlink()
    (folder / first).rename(folder / "model-00001-of-00001.safetensors")
    message = refusal(TensorFiles, folder)
    assert f"{first}, {second} are missing" in message
    assert "1 file that the index does not name (model-00001-of-00001.safetensors)" in message


@pytest.mark.parametrize(
    "name", ["..\\other.safetensors", "C:\\other.safetensors", "/etc/other.safetensors", "a/../../b"]
)
def test_the_index_cannot_name_files_outside_of_the_folder(folder, name):
    shard(folder)
    edit(folder / "model.safetensors.index.json", weight_map={"model.norm.weight": name})
    assert "points outside the folder" in refusal(TensorFiles, folder)


# Files that are something else.


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (POINTER, r"is a Git LFS pointer, a stub for a file of 1.7 MB: run `git lfs pull`"),
        (HTML, "is a web page"),
        ("Entry not found", "is an error message of a server ('Entry not found')"),
        ("../../blobs/4d7a2146", "is a link that was saved as text, to ../../blobs/4d7a2146"),
        ("", "is empty: download it again"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_stubs_are_named_for_what_they_are(folder, name, content, what):
    """transformers#27923, OmniParser#34, exllama#242: "HeaderTooLarge" meant a Git LFS pointer."""
    (folder / name).write_text(content)
    reader = import_tokenizer if name.startswith("token") else huggingface.open_language
    options = {"num_embeddings": ROWS} if name.startswith("token") else {}
    assert f"{name} {what}" in refusal(reader, folder, **options)


def test_a_stub_of_a_shard_or_of_a_template_is_named(folder):
    _, second = shard(folder)
    (folder / second).write_text(POINTER)
    assert f"{second} is a Git LFS pointer" in refusal(TensorFiles, folder)
    (folder / "chat_template.jinja").write_text(POINTER)
    assert "chat_template.jinja is a Git LFS pointer" in refusal(import_tokenizer, folder, num_embeddings=ROWS)


def test_a_config_with_a_byte_order_mark_is_read(folder):
    """simpletransformers#1169: editors on Windows write one in front of JSON."""
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text("\ufeff" + (folder / name).read_text(), encoding="utf-8")
    assert huggingface.read_language_config(folder) == huggingface.read_language_config(NANO)
    import_tokenizer(folder, num_embeddings=ROWS)


# Folders without weights in the format of transformers.


def test_an_adapter_is_refused_with_the_command_that_merges_it(folder):
    """mergekit#197, transformers#30513: a LoRA has adapter_config.json and adapter_model.safetensors, and no model."""
    adapter = {"base_model_name_or_path": "org/Llama-nano", "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    for read in (lambda: TensorFiles(folder), lambda: backbone_folder("language", str(folder))):
        message = refusal(read)
        assert "a PEFT adapter of org/Llama-nano, not a model" in message
        assert "merge_and_unload" in message and "AutoModelForCausalLM" in message
        (folder / "config.json").unlink(missing_ok=True)


def test_an_adapter_next_to_a_model_is_noted(folder):
    (folder / "adapter_config.json").write_text("{}")
    save(folder, {"lora": np.zeros(3, np.float32)}, "adapter_model.safetensors")
    (note,) = TensorFiles(folder).notes
    assert "the PEFT adapter next to the weights is not applied" in note


def test_folders_that_cannot_be_asked_are_named(folder):
    """peft, transformers: an adapter, a language model or a Git LFS pointer given to `alignvlm ask --checkpoint`."""
    assert "a model of type 'llama'" in refusal(load, folder)
    (folder / "config.json").write_text(POINTER)
    assert "config.json is a Git LFS pointer" in refusal(load, folder)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"auto_mapping": {"base_model_class": "AlignVLMForX"}}')
    message = refusal(load, folder)
    assert "PEFT adapter" in message and "AutoModelForImageTextToText" in message and "AutoProcessor" in message


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model-Q4_K_M.gguf", r"GGUF, for llama.cpp"),
        ("consolidated.00.pth", "Meta's original format"),
        ("onnx/model.onnx", "ONNX"),
        ("model.fp16.safetensors", "rename it to model.safetensors"),
        ("consolidated.safetensors", "rename it to model.safetensors"),
        ("model.safetensors.aria2", "a download did not finish"),
    ],
)
def test_other_formats_are_named(folder, name, what):
    """torchtune#1688 (consolidated.00.pth), unsloth-zoo#346: other formats and names than transformers reads."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / name)
    message = refusal(TensorFiles, folder)
    assert "no weights: neither model.safetensors nor" in message and what in message


@pytest.mark.parametrize(
    ("entry", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ, 4 bits"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ, 4 bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "FP8"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes, 8 bits"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes, 4 bits"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX, 4 bits"),
    ],
)
def test_quantized_models_are_refused_by_name(folder, entry, method):
    """gpt-fast#88, mlx-vlm#1464: quantized weights in a folder that looks like a model's."""
    edit(folder / "config.json", **entry)
    assert f"the weights are quantized ({method})" in refusal(huggingface.open_language, folder)


def test_quantized_tensors_are_refused_without_a_word_in_the_config(folder):
    key = "model.layers.0.mlp.up_proj"
    save(folder, {**TENSORS, f"{key}.qweight": np.zeros((4, 4), np.int32), f"{key}.scales": np.zeros(4, np.float16)})
    assert "quantized (GPTQ or AWQ)" in refusal(huggingface.open_language, folder)


# Names of tensors, and the head.


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "base_model.model.model.", ""])
def test_prefixes_of_larger_models_and_wrappers_are_removed(folder, prefix):
    """baby-llama2-chinese#34 (`_orig_mod.`), PosterLlama#7 (`base_model.model.`): a decoder saved inside another."""
    save(folder, {key.replace("model.", prefix, 1): tensor for key, tensor in TENSORS.items()})
    assert_same_model(folder)


@pytest.mark.parametrize("prefix", ["vision_tower.vision_model.", "model.vision_tower.", ""])
def test_prefixes_of_vision_encoders_are_removed(tmp_path, prefix):
    """LLaVA's checkpoints keep their encoder as vision_tower.vision_model, or vision_tower in transformers 5."""
    nano = shutil.copytree(backbone_folder("vision", "nano"), tmp_path / "vision")
    expected = huggingface.load_vision_folder(nano)[1]
    tensors = safetensors.numpy.load_file(nano / "model.safetensors")
    save(nano, {key.replace("vision_model.", prefix, 1): tensor for key, tensor in tensors.items()})
    kernel = huggingface.load_vision_folder(nano)[1]["patch_embedding"]["kernel"]
    np.testing.assert_array_equal(kernel, expected["patch_embedding"]["kernel"])


def test_an_adapter_inside_the_weights_is_refused(folder):
    """PosterLlama#7: the state dict of a PEFT model, with lora_A and lora_B."""
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    save(folder, {**TENSORS, key: np.zeros((4, 128), np.float32)})
    assert "an adapter that is not merged" in refusal(huggingface.open_language, folder).replace("a PEFT", "an")


def test_a_tied_head_may_be_stored_and_an_untied_one_must_be(folder):
    """vllm#6758: tied weights that store lm_head.weight, too; torchtune#1688: a head that only the config explains."""
    save(folder, {**TENSORS, "lm_head.weight": TENSORS["model.embed_tokens.weight"].copy()})
    assert_same_model(folder)
    shutil.copy(NANO / "model.safetensors", folder)
    edit(folder / "config.json", tie_word_embeddings=None)
    assert 'add "tie_word_embeddings": true' in refusal(huggingface.load_language_folder, folder)


# Tokenizers.


def fill_ids(folder, pad=None):
    """Gives every row of the table a token, and adds `pad` after them."""
    tokens = json.loads((folder / "tokenizer.json").read_text())
    have = set(tokens["model"]["vocab"].values()) | {entry["id"] for entry in tokens["added_tokens"]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    more = [f"<|spare_{i}|>" for i in range(max(have) + 1, ROWS)] + [pad] * bool(pad)
    tokens["added_tokens"] += [{"id": max(have) + 1 + i, "content": token, **flags} for i, token in enumerate(more)]
    (folder / "tokenizer.json").write_text(json.dumps(tokens))


def test_a_padding_token_beyond_the_table_gets_a_row(folder):
    """llama-cookbook#199, TinyLlama#41: a recipe adds <PAD> and does not resize the table."""
    fill_ids(folder, "<PAD>")
    edit(folder / "tokenizer_config.json", pad_token="<PAD>")
    imported = import_tokenizer(folder, num_embeddings=ROWS)
    assert (imported.num_embeddings, imported.chat.pad_id) == (576, 512)
    assert any("padding token '<PAD>' has id 512" in note and "512 to 576 rows" in note for note in imported.notes)
    edit(folder / "tokenizer_config.json", pad_token="<|pad|>")
    message = refusal(import_tokenizer, folder, num_embeddings=ROWS)
    assert "none for 1 tokens ('<PAD>')" in message and "resize_token_embeddings" in message


def test_added_tokens_json_is_read(folder):
    """llama-cookbook#189: older trainings list the added <PAD> in added_tokens.json, and not in tokenizer.json."""
    fill_ids(folder)
    (folder / "added_tokens.json").write_text('{"<PAD>": 512}')
    edit(folder / "tokenizer_config.json", pad_token="<PAD>")
    assert import_tokenizer(folder, num_embeddings=ROWS).chat.pad_id == 512


def test_a_template_that_opens_the_answer_is_used_without_the_opening(folder):
    """LLaMA-Factory#6987: the template of DeepSeek-R1-Distill-Llama ends every prompt with "<think>"."""
    header = "'<|assistant|><think>\\n'"
    template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}{% endif %}"
        "{% if m['role'] == 'assistant' %}{% set text = m['content'].split('</think>')[-1] %}"
        "{{ '<|assistant|>' + text + '<|end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ " + header + " }}{% endif %}\n"
    )
    (folder / "chat_template.jinja").write_text(template)
    imported = import_tokenizer(folder, num_embeddings=ROWS)
    assert any("opens every answer with '<think>\\n'" in note and "--chat-template" in note for note in imported.notes)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Total?"}]}
    prompt = imported.chat.encode_prompt([question], [2]).tokens
    whole = imported.chat.encode([question, {"role": "assistant", "content": "12"}], [2])
    np.testing.assert_array_equal(whole.tokens[: len(prompt)], prompt)
    # Imported again, as after an export, nothing is added.
    imported.chat.save(folder)
    assert import_tokenizer(folder, num_embeddings=ROWS).chat.chat_template == imported.chat.chat_template


def test_templates_that_cannot_be_used_ask_for_another(folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert "pass it with --chat-template" in refusal(import_tokenizer, folder, num_embeddings=ROWS)


def test_templates_with_names_are_found(folder):
    """transformers: `additional_chat_templates/NAME.jinja`, or a list in tokenizer_config.json."""
    template = (folder / "chat_template.jinja").read_text()
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").rename(folder / "additional_chat_templates" / "rag.jinja")
    assert "'rag' is used" in import_tokenizer(folder, num_embeddings=ROWS).notes[0]
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": template}])
    assert "'tool_use' is used" in import_tokenizer(folder, num_embeddings=ROWS).notes[0]


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"tokenizer.model": "\n\x0e\n\x05<unk>"}, "AutoTokenizer.from_pretrained"),
        ({"tokenizer.model": POINTER}, "tokenizer.model is a Git LFS pointer"),
        ({"tekken.json": "{}"}, "mistral-common"),
    ],
)
def test_tokenizers_of_other_formats_are_named(folder, files, what):
    (folder / "tokenizer.json").unlink()
    for name, content in files.items():
        (folder / name).write_text(content)
    assert what in refusal(import_tokenizer, folder, num_embeddings=ROWS)
