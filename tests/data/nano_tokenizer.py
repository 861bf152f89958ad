"""A tokenizer folder like nano's, trained in milliseconds: byte-level BPE and the included chat template."""

import json
import pathlib

import tokenizers

import alignvlm_jax.pretraining
from alignvlm_jax.data.chat import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE

SPECIAL_TOKENS = ["<|begin|>", "<|pad|>", "<|image|>", "<|user|>", "<|assistant|>", "<|end|>"]
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|begin|>",
    "eos_token": "<|end|>",
    "pad_token": "<|pad|>",
    "extra_special_tokens": {"image_token": "<|image|>"},
    "clean_up_tokenization_spaces": False,
}
CHAT_TEMPLATE = pathlib.Path(alignvlm_jax.pretraining.__path__[0], TEMPLATE_FILE).read_text()

_CORPUS = [
    "What is the total? 12.50",
    "Read the page.",
    "Date: 2024-03-11 Name: Anna Invoice 8841",
    "the total of the page",
]


def write_chat_folder(folder: pathlib.Path, *, template: str = CHAT_TEMPLATE, config=TOKENIZER_CONFIG) -> pathlib.Path:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    # Some published files have these settings; the reader must switch them off.
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=50, pad_id=1, pad_token="<|pad|>")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / TOKENIZER_FILE))
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    (folder / TEMPLATE_FILE).write_text(template)
    return folder
