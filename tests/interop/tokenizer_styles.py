"""Writes small tokenizer folders in the styles of the Llama family, with chat templates like the original ones."""

import json
import pathlib
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

_CORPUS = [
    "What is the total? 12.50 Read the page. Date: 2024-03-11 Name: Anna Invoice 8841",
    "the total of the page [INST] <<SYS>> [/INST] User: Assistant: <|user|> system assistant",
] * 4

# The beginning of Llama 3.2's template, which always writes a system message with today's date.
LLAMA3_TEMPLATE = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The system message goes first. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TINYLLAMA_TEMPLATE = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


def _special(tokens):
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


def _byte_level(special: list[str], *, first: bool) -> tokenizers.Tokenizer:
    """Returns byte-level BPE with special tokens before the vocabulary (SmolLM2) or after it (Llama 3)."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=special if first else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if not first:
        tokenizer.add_special_tokens(_special(special))
    return tokenizer


def _sentencepiece(*, first_only: bool) -> tokenizers.Tokenizer:
    """Returns BPE over words that begin with "▁" for a space, with bytes as a fallback."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
        initial_alphabet=[],
        show_progress=False,
    )
    # It is trained word by word; afterwards the complete text is one word, as in Llama's tokenizer.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(_CORPUS, trainer)
    trained = json.loads(tokenizer.to_str())
    trained["added_tokens"] = [token for token in trained["added_tokens"] if token["content"] in special]
    trained["pre_tokenizer"] = None
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(trained))
    if first_only:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = _begins_with("<s>", 1)
    return tokenizer


def _begins_with(bos: str, bos_id: int):
    """Returns a post-processor that adds the begin-of-text token."""
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )


def _named(*tokens: str, **more) -> dict[str, Any]:
    """Returns a tokenizer config that names the begin, end and unknown tokens."""
    return {**dict(zip(("bos_token", "eos_token", "unk_token"), tokens, strict=False)), **more}


def write_style(folder: pathlib.Path, style: str) -> pathlib.Path:
    """Writes a folder in the style of "llama3", "smollm2", "tinyllama", "llama2", "llama2_new" or "base"."""
    generation = {}
    if style in ("llama3", "base"):
        special = [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|reserved_special_token_0|>",
            "<|reserved_special_token_1|>",
        ]
        special += ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
        tokenizer = _byte_level(special, first=False)
        bos_id, end_id, eom_id, eot_id = (tokenizer.token_to_id(special[i]) for i in (0, 1, 6, 7))
        tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=True), _begins_with(special[0], bos_id)]
        )
        eos = special[7] if style == "llama3" else special[1]
        config = _named(special[0], eos, tokenizer_class="PreTrainedTokenizerFast", model_max_length=131072)
        template = LLAMA3_TEMPLATE if style == "llama3" else None
        generation = {"eos_token_id": [end_id, eom_id, eot_id] if style == "llama3" else end_id}
    elif style == "smollm2":
        tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"], first=True)
        config = _named("<|im_start|>", "<|im_end|>", "<|endoftext|>", tokenizer_class="GPT2Tokenizer")
        config |= {"pad_token": "<|im_end|>", "add_prefix_space": False, "model_max_length": 8192}
        template = SMOLLM2_TEMPLATE
        generation = {"eos_token_id": 2}
    else:
        tokenizer = _sentencepiece(first_only=style == "llama2_new")
        config = _named("<s>", "</s>", "<unk>", tokenizer_class="LlamaTokenizer", legacy=style != "llama2_new")
        config |= {"add_bos_token": True, "model_max_length": 10**30}
        config |= {"pad_token": "</s>"} if style == "tinyllama" else {}
        template = TINYLLAMA_TEMPLATE if style == "tinyllama" else LLAMA2_TEMPLATE
    # Truncation and padding that a training run leaves in the file; the import must remove them.
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=50)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # Older folders store the template in the config.
    config |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def num_ids(folder: pathlib.Path) -> int:
    """Returns the largest id in a folder's tokenizer.json plus one."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
