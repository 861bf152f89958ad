"""Imports the tokenizer of a Hugging Face folder, and exports a checkpoint's tokenizer for transformers.

Tokenizers of the Llama family support only text. `import_tokenizer` chooses one of the tokens as the image placeholder
(or adds one), adapts the chat template to images (`chat_template.py`), records all tokens that end an answer, and drops
the padding and truncation settings that a training run left behind. `export_tokenizer` writes the same tokens, ids and
template in the format of transformers 5.x. Neither function needs transformers.

If a user types the text of a special token, it stays text in `ChatTokenizer`, and in everything that renders the chat
template of an exported folder and tokenizes the result (`typed_text.py`). The folder of the decoder alone is a plain
one: there, typed special tokens are parsed unless transformers is called with `sanitize_control_tokens=True`.
"""

import json
import os
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from alignvlm_jax.data.chat import (
    CONFIG_FILE,
    END_TOKENS,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    ChatTokenizer,
    special_names,
)
from alignvlm_jax.downloads.stubs import describe_stub
from alignvlm_jax.errors import UserError
from alignvlm_jax.interop.chat_template import adapt_to_images
from alignvlm_jax.interop.typed_text import mark_typed_text, unmark_typed_text
from alignvlm_jax.locations import open_location

DEFAULT_TEMPLATE = pathlib.Path(__file__).with_name("default_chat_template.jinja")

# Common names of the image placeholder in vision-language models, and Llama 3's reserved tokens.
_IMAGE_TOKENS = ("<image>", "<|image|>", "<image_pad>", "<|image_pad|>", "<image_soft_token>", "<IMG_CONTEXT>", "[IMG]")
_RESERVED = re.compile(r"<\|reserved_special_token_(\d+)\|>")
_NEW_IMAGE_TOKEN = "<image>"
# A table that has to grow is padded to a multiple of this: its matrix product stays fast, and it can be sharded.
_ROW_MULTIPLE = 64
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
# A key of exported tokenizer_config.json files that only this project uses. It keeps the rule that the export removes
# from tokenizer.json, so that the import can restore it.
_RULE = "plain_text_post_processor"
_ADDED_FILE = "added_tokens.json"
# Folder of templates with names, next to chat_template.jinja, which is then the default one.
_NAMED_TEMPLATES = "additional_chat_templates"
_LLAMA_PAD_TOKEN = "<|finetune_right_pad_id|>"


class ImportedTokenizer(NamedTuple):
    """An imported tokenizer.

    Attributes:
      chat: the tokenizer.
      num_embeddings: number of rows that the embedding table must have.
      notes: sentences for the user about decisions made during the import.
    """

    chat: ChatTokenizer
    num_embeddings: int
    notes: tuple[str, ...]


def import_tokenizer(
    folder: str | os.PathLike,
    *,
    num_embeddings: int,
    image_token: str | None = None,
    chat_template: str | None = None,
) -> ImportedTokenizer:
    """Reads the tokenizer of a Hugging Face folder and adapts it to images.

    Args:
      folder: contains tokenizer.json and optionally tokenizer_config.json, chat_template.jinja,
        special_tokens_map.json, generation_config.json and config.json.
      num_embeddings: number of rows of the language model's embedding table.
      image_token: text of the image placeholder. By default the first that exists of: the token named by the folder, a
        well-known placeholder in its vocabulary, a reserved token of Llama 3; otherwise `<image>` is appended to the
        vocabulary.
      chat_template: text of a Jinja template that replaces the folder's.

    Returns:
      The tokenizer, the number of rows that the embedding table must have (larger than `num_embeddings` if the image
      token needs a new row), and notes.

    Raises:
      UserError: if a file is missing or damaged, or if the vocabulary does not fit the embedding table.
    """
    folder = pathlib.Path(folder)
    try:
        return _import(_read_folder(folder), num_embeddings, image_token, chat_template)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def export_tokenizer(
    tokenizer_folder: str | os.PathLike, out_folder: str | os.PathLike, *, language_only: bool = False
) -> None:
    """Writes the tokenizer of a checkpoint for transformers 5.x: tokenizer.json, tokenizer_config.json, chat template.

    Args:
      tokenizer_folder: tokenizer folder of a checkpoint.
      out_folder: output folder; created if needed. Existing files of these three names are replaced.
      language_only: write the tokenizer of a plain language model, which is used without the processor. The rule that
        adds the begin-of-text token to plain text is then kept as it was in the imported folder, and typed text is not
        marked.
    """
    tokenizer_folder = open_location(tokenizer_folder)
    chat = ChatTokenizer.from_folder(tokenizer_folder)  # Also validates the folder.
    vocabulary = _read_json(tokenizer_folder / TOKENIZER_FILE)
    config = _read_json(tokenizer_folder / CONFIG_FILE)
    vocabulary["padding"] = vocabulary["truncation"] = None
    rule, template = vocabulary.get("post_processor"), chat.chat_template
    if not language_only:
        # The chat template already writes the begin-of-text token. With this rule, transformers' processors would add a
        # second one.
        vocabulary["post_processor"] = _without_added_tokens(rule)
        vocabulary, template = mark_typed_text(vocabulary, template)
    names = special_names(config)
    image_token = names.pop("image_token")
    tokens_by_id = {token_id: token for token, token_id in _token_ids(vocabulary).items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "pad_token": tokens_by_id[chat.pad_id],
        "extra_special_tokens": {"image_token": image_token},
        # Pad on the left, so that prompts of different lengths end, and are continued, at the same position.
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **{key: config[key] for key in ("model_max_length", END_TOKENS) if key in config},
    }
    if vocabulary.get("post_processor") != rule:
        config[_RULE] = rule
    ChatTokenizer(_dump(vocabulary), config, template).save(out_folder)


def read_exported_tokenizer(folder: str | os.PathLike) -> ChatTokenizer:
    """Reads the tokenizer of an exported folder, without the changes that only other software needs."""
    folder = pathlib.Path(folder)
    try:
        vocabulary, template = unmark_typed_text(
            _read_json(folder / TOKENIZER_FILE), _read_text(folder / TEMPLATE_FILE)
        )
        return ChatTokenizer(_dump(vocabulary), _read_json(folder / CONFIG_FILE), template)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def _import(files: "_Files", num_embeddings: int, image_token: str | None, template: str | None) -> ImportedTokenizer:
    """Imports a tokenizer from parsed files; see `import_tokenizer`."""
    notes = []
    vocabulary = files.vocabulary
    vocabulary["padding"] = vocabulary["truncation"] = None
    # Folders written by `export_tokenizer` keep the rule that the export removed.
    if _RULE in files.config:
        vocabulary["post_processor"] = files.config[_RULE]
    # Collect the special tokens and the template, which may be spread over several files.
    _add_missing(vocabulary, files.config)
    names = _find_names(files, vocabulary, notes)
    end_tokens = _find_end_tokens(files, _token_ids(vocabulary), notes)
    vocabulary, template = unmark_typed_text(vocabulary, _find_template(files, notes) if template is None else template)

    # Choose the image token, which must not have another role.
    named_token = names.pop("image_token", None)
    taken = {*names.values(), *end_tokens}
    image_token = image_token or named_token or _find_image_token(vocabulary, taken, template)
    if image_token in taken:
        raise UserError(f"the image token {image_token!r} begins, ends or pads a text: choose another one")
    if not re.fullmatch(r"<.+>|\[.+\]", image_token):
        raise UserError(f"the image token {image_token!r} could occur in ordinary text: choose one in <> or []")
    rows = _check_rows(_token_ids(vocabulary), image_token, names.get("pad_token"), num_embeddings, notes)
    # Mark all named tokens as special, so that the tokenizer never splits them.
    for token in (*names.values(), image_token):
        _make_special(vocabulary, token)
    for entry in vocabulary["added_tokens"]:
        if entry.get("special"):
            # If it were normalized, a token would get SentencePiece's leading space and be found only in some places.
            entry["normalized"] = False

    # Write the config from scratch, because the folder's may have settings of older versions of transformers.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "extra_special_tokens": {"image_token": image_token},
        "clean_up_tokenization_spaces": False,
    }
    limit = files.config.get("model_max_length")
    if isinstance(limit, int) and limit < 2**31:  # transformers writes 10**30 if there is no limit.
        config["model_max_length"] = limit
    if end_tokens:
        config[END_TOKENS] = end_tokens
    template = adapt_to_images(template, special_names(config), notes)
    try:
        chat = ChatTokenizer(_dump(vocabulary), config, template)
    except UserError as error:
        raise UserError(f"{error}. To use another chat template, pass it with --chat-template") from error
    # The `tokenizers` library ignores the ids of added tokens in the file and numbers them consecutively. If the ids
    # have gaps, tokens would silently move to other rows of the embedding table.
    renumbered = [
        entry["content"] for entry in vocabulary["added_tokens"] if chat.token_to_id(entry["content"]) != entry["id"]
    ]
    if renumbered:
        raise UserError(
            f"{TOKENIZER_FILE}: its ids have gaps, so {', '.join(map(repr, renumbered))} cannot be appended; "
            "choose an image token that is in the vocabulary"
        )
    return ImportedTokenizer(chat, rows, tuple(notes))


class _Files(NamedTuple):
    """The parsed files of a folder; missing optional files are empty."""

    vocabulary: dict[str, Any]
    config: dict[str, Any]
    special_map: dict[str, Any]
    generation: dict[str, Any]
    model: dict[str, Any]
    template: str | dict[str, str] | None


def _read_folder(folder: pathlib.Path) -> _Files:
    """Reads the files of a tokenizer folder; raises a `UserError` if it has no tokenizer.json."""
    if not folder.is_dir():
        raise UserError("no such folder")
    if not (folder / TOKENIZER_FILE).exists():
        if reason := describe_stub(folder / TOKENIZER_FILE):  # a link without a target
            raise UserError(f"{TOKENIZER_FILE} {reason}")
        if reason := describe_stub(folder / "tokenizer.model"):
            raise UserError(f"it has no {TOKENIZER_FILE}, and tokenizer.model {reason}")
        if (folder / "tekken.json").exists():
            raise UserError(
                f"it has a tokenizer of mistral-common (tekken.json), without {TOKENIZER_FILE}: download the model in "
                f"the format of transformers, which has {TOKENIZER_FILE}"
            )
        if any((folder / name).exists() for name in ("tokenizer.model", "vocab.json")):
            raise UserError(
                f"it contains a tokenizer in an older format, without {TOKENIZER_FILE}. Convert it on a machine with "
                'transformers and sentencepiece: python -c "import transformers as t; '
                f"t.AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
            )
        raise UserError(f"it has no {TOKENIZER_FILE}")
    template = None
    if (folder / TEMPLATE_FILE).exists():
        template = _read_text(folder / TEMPLATE_FILE)
    elif (folder / "chat_template.json").exists():  # Some versions of transformers stored it there.
        template = _read_json(folder / "chat_template.json").get("chat_template")
    optional = (CONFIG_FILE, "special_tokens_map.json", "generation_config.json", "config.json")
    parsed = [_read_json(folder / name) if (folder / name).exists() else {} for name in optional]
    if template is None and not parsed[0].get("chat_template"):
        named = sorted((folder / _NAMED_TEMPLATES).glob("*.jinja"))
        template = {path.stem: _read_text(path) for path in named} or None
    files = _Files(_read_json(folder / TOKENIZER_FILE), *parsed, template)
    # Older trainings list the tokens that they added in a file of their own.
    if (folder / _ADDED_FILE).exists() and not files.config.get("added_tokens_decoder"):
        added = _read_json(folder / _ADDED_FILE)
        files.config["added_tokens_decoder"] = {i: {"content": token} for token, i in added.items()}
    return files


def _read_text(path: pathlib.Path) -> str:
    if reason := describe_stub(path):
        raise UserError(f"{path.name} {reason}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name}: cannot be read ({error})") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises a `UserError` if there is none."""
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path.name}: not valid JSON ({error}); copy the file again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name}: not a JSON object; copy the file again")
    return content


def _dump(vocabulary: Mapping[str, Any]) -> str:
    # No indentation, with which json.dumps takes seconds for a vocabulary of Llama 3's size.
    return json.dumps(vocabulary, ensure_ascii=False) + "\n"


def _token_ids(vocabulary: Mapping[str, Any]) -> dict[str, int]:
    """Returns the id of every token of a parsed tokenizer.json."""
    try:
        ids = vocabulary["model"]["vocab"]
        # A dict for BPE and WordPiece, a list of (piece, score) for Unigram.
        ids = dict(ids) if isinstance(ids, dict) else {piece[0]: i for i, piece in enumerate(ids)}
        return ids | {token["content"]: token["id"] for token in vocabulary.get("added_tokens") or ()}
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{TOKENIZER_FILE}: no vocabulary in model.vocab; copy the file again") from error


def _next_id(ids: Mapping[str, int]) -> int:
    return 1 + max(ids.values())


def _make_special(vocabulary: dict[str, Any], token: str) -> None:
    """Marks a token as special, so that it is never split. A new token gets the next free id."""
    entries = vocabulary.setdefault("added_tokens", [])
    for entry in entries:
        if entry["content"] == token:
            entry["special"] = True
            return
    ids = _token_ids(vocabulary)
    entries.append({"id": ids.get(token, _next_id(ids)), "content": token, **_FLAGS, "special": True})
    entries.sort(key=lambda entry: entry["id"])


def _add_missing(vocabulary: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Adds the tokens and special flags that only tokenizer_config.json lists, as transformers does."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        listed = [{"id": int(i), **_FLAGS, "special": False, **entry} for i, entry in listed.items()]
        contents = [entry["content"] for entry in listed]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{CONFIG_FILE}: added_tokens_decoder is not a map of tokens; copy the file again") from error
    entries = vocabulary["added_tokens"] = vocabulary.get("added_tokens") or []
    ids = _token_ids(vocabulary)
    taken = set(ids.values())
    for content, entry in zip(contents, listed, strict=True):
        if content not in ids and entry["id"] in taken:
            raise UserError(
                f"{CONFIG_FILE} gives {content!r} the id {entry['id']}, but {TOKENIZER_FILE} gives it to another "
                "token: the two files do not belong to the same tokenizer"
            )
        if content not in ids:
            entries.append(entry)
        elif entry["special"]:
            _make_special(vocabulary, content)
    entries.sort(key=lambda entry: entry["id"])


def _find_names(files: _Files, vocabulary: Mapping[str, Any], notes: list[str]) -> dict[str, str]:
    """Returns the special tokens by name ({"bos_token": "<s>", ...}), except tokens that the vocabulary lacks."""
    names = special_names(files.special_map) | special_names(files.config)
    ids = _token_ids(vocabulary)
    tokens_by_id = {token_id: token for token, token_id in ids.items()}
    # Some folders state only the ids, in the files of the model. eos_token_id may be a list; the first entry counts.
    for name in ("bos_token", "eos_token"):
        for config in (files.generation, files.model):
            token_id = config.get(f"{name}_id")
            token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
            if name not in names and token_id in tokens_by_id:
                names[name] = tokens_by_id[token_id]
    if "eos_token" not in names:
        raise UserError(f'{CONFIG_FILE} does not name the token that ends a text: add "eos_token"')
    # Drop names whose token does not exist. A missing image token is added later.
    for name, token in list(names.items()):
        if token in ids or name == "image_token":
            continue
        if name in ("bos_token", "eos_token"):
            raise UserError(f"{CONFIG_FILE}: {name} {token!r} is not in {TOKENIZER_FILE}")
        del names[name]
        notes.append(f"{name} {token!r} is not in the vocabulary and was dropped")
    if "pad_token" not in names and _LLAMA_PAD_TOKEN in ids:
        names["pad_token"] = _LLAMA_PAD_TOKEN
    return names


def _find_template(files: _Files, notes: list[str]) -> str:
    """Returns the folder's chat template, or the default one."""
    template = files.template if files.template is not None else files.config.get("chat_template")
    # Several templates are a list of {"name", "template"} in tokenizer_config.json, or a map from names to templates.
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
    if isinstance(template, Mapping):
        named = dict(template)
        template = named.get("default") or next(iter(named.values()), None)
        if len(named) > 1 or "default" not in named:
            used = next(name for name, text in named.items() if text == template)
            notes.append(
                f"the chat templates have names ({', '.join(map(str, named))}); {used!r} is used, and another one can "
                "be passed with --chat-template"
            )
    if isinstance(template, str):
        return template
    notes.append(
        "the folder has no chat template (a base model?): the default one is used, with 'User: ...' and 'Assistant: "
        "...' on alternating lines; pass another one with --chat-template"
    )
    return _read_text(DEFAULT_TEMPLATE)


def _find_image_token(vocabulary: Mapping[str, Any], taken: Collection[str], template: str) -> str:
    """Returns a known image token of the vocabulary, the first unused reserved token, or a new token."""
    added = [entry["content"] for entry in vocabulary["added_tokens"]]
    for token in _IMAGE_TOKENS:
        if token in added:
            return token
    reserved = [token for token in added if _RESERVED.fullmatch(token)]
    free = [token for token in reserved if token not in taken and token not in template]
    return min(free, key=lambda token: int(_RESERVED.fullmatch(token)[1]), default=_NEW_IMAGE_TOKEN)


def _check_rows(
    ids: Mapping[str, int], image_token: str, pad_token: str | None, num_embeddings: int, notes: list[str]
) -> int:
    """Returns the number of rows that the embedding table must have.

    It grows only for the image token and for the padding token. Nothing is ever read from the padding token's row, so
    trainings add one without a row.

    Raises:
      UserError: if other tokens have no row.
    """
    may_grow = (image_token, pad_token)
    outside = sorted((token for token, i in ids.items() if i >= num_embeddings and token not in may_grow), key=ids.get)
    if outside:
        some = ", ".join([*map(repr, outside[:5]), *(["..."] if len(outside) > 5 else [])])
        raise UserError(
            f"{TOKENIZER_FILE} has {_next_id(ids)} ids, but the embedding table has {num_embeddings} rows: "
            f"none for {len(outside)} tokens ({some}). Does this tokenizer belong to another model? If the tokens were "
            "added for a training, add their rows with transformers' resize_token_embeddings, or remove the tokens"
        )
    # Published tables have some spare rows; many of them suggest the tokenizer of another model.
    unused = num_embeddings - len(set(ids.values()))
    if unused > num_embeddings // 2:
        notes.append(
            f"{unused} of the embedding table's {num_embeddings} rows belong to no token of {TOKENIZER_FILE}: "
            "make sure that the tokenizer belongs to this model"
        )
    # The image token needs a row: its own, a spare one, or one that is added to the table.
    added = image_token not in ids
    image_id = _next_id(ids) if added else ids[image_token]
    pad_id = ids.get(pad_token, 0)
    # Grow the table to the next multiple.
    needed = max(image_id, pad_id) + 1
    rows = num_embeddings if needed <= num_embeddings else -(-needed // _ROW_MULTIPLE) * _ROW_MULTIPLE
    grows = f"the embedding table grows from {num_embeddings} to {rows} rows"
    if pad_id >= num_embeddings:
        notes.append(f"padding token {pad_token!r} has id {pad_id}, for which the embedding table has no row: {grows}")
    if image_id >= num_embeddings:
        notes.append(f"image token {image_token!r} is {'added as ' if added else ''}id {image_id}: {grows}")
    else:
        where = ", a spare row of the embedding table" if added else ", which is already in the vocabulary"
        notes.append(f"image token {image_token!r} has id {image_id}{where}")
    return rows


def _find_end_tokens(files: _Files, ids: Mapping[str, int], notes: list[str]) -> list[str]:
    """Returns the tokens that end a text.

    They are listed in generation_config.json or else in config.json. Those in the tokenizer_config.json of a folder
    written by `export_tokenizer` come first.
    """
    listed = files.generation.get("eos_token_id", files.model.get("eos_token_id"))
    listed = listed if isinstance(listed, list) else [listed] if listed is not None else []
    tokens_by_id = {token_id: token for token, token_id in ids.items()}
    unknown = [token_id for token_id in listed if token_id not in tokens_by_id]
    if unknown:
        notes.append(f"eos_token_id lists {', '.join(map(str, unknown))}, which belong to no token: ignored")
    exported = [token for token in files.config.get(END_TOKENS) or () if token in ids]
    # dict.fromkeys drops repetitions and keeps the order.
    return list(
        dict.fromkeys([*exported, *(tokens_by_id[token_id] for token_id in listed if token_id in tokens_by_id)])
    )


def _without_added_tokens(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns a post-processor of tokenizer.json without the rule that adds tokens at the ends of a text."""
    if processor is None or processor.get("type") == "TemplateProcessing":
        return None
    if processor.get("type") == "Sequence":
        kept = [_without_added_tokens(entry) for entry in processor["processors"]]
        return {**processor, "processors": [entry for entry in kept if entry is not None]}
    return processor
