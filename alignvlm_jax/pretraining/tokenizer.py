"""Trains the nano decoder's tokenizer: byte-level BPE with 512 tokens, on the text of training documents.

Words of questions and labels become single tokens, with the space and the capital before them. Other capitals, digits,
punctuation and spaces are never merged. The values on a page consist of them and have one character per patch, so each
patch corresponds to one token.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from alignvlm_jax.data.synthetic import draw_document

SPECIAL_TOKENS = {
    "bos_token": "<|begin|>",
    "eos_token": "<|end|>",
    "pad_token": "<|pad|>",
    "image_token": "<|image|>",
}
_ROLES = ("<|user|>", "<|assistant|>")
VOCAB_SIZE = 512
CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"

READING_INSTRUCTIONS = ("Read the page.", "Transcribe the document.", "What does the page say?", "Read all the text.")


def save_tokenizer(folder: str | Path, *, seed: int, num_documents: int = 3000, max_length: int = 1024) -> None:
    """Trains the tokenizer and writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # BPE merges only within pieces. A piece is a single character, or a word in lower case with the space and the
    # capital before it, if there are any.
    pieces = tokenizers.Regex(r" ?[A-Z]?[a-z]+|\s|[A-Z]|[0-9]|[^\sA-Za-z0-9]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*SPECIAL_TOKENS.values(), *_ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, num_documents), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **SPECIAL_TOKENS,
        "additional_special_tokens": [SPECIAL_TOKENS["image_token"], *_ROLES],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.read_text())


def _texts(seed: int, num_documents: int) -> Iterator[str]:
    # About one instruction per document: BPE merges what is frequent.
    yield from READING_INSTRUCTIONS * (num_documents // 4)
    for index in range(num_documents):
        document = draw_document(seed, "train", index, render=False)
        yield from document.questions
        yield from document.lines
