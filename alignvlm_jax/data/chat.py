"""Tokenizes conversations with a Hugging Face tokenizer folder, without transformers.

Axis letters: n tokens of one example, T visual tokens of one example.

A folder holds `tokenizer.json` (read by the `tokenizers` library), `tokenizer_config.json` (the tokens that begin and
end a text, pad, and stand for an image) and `chat_template.jinja` (the text form of a conversation). A conversation is

    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Total?"}]},
     {"role": "assistant", "content": "12.50"}]

where content may also be a plain string. The template writes the image token once per image. `encode` repeats it once
per visual token and numbers the repetitions. With the nano template and an image of 3 visual tokens:

    rendered       <|begin|><|user|><|image|>Total?<|assistant|>12.50<|end|>
    tokens         <|begin|> <|user|> <|image|> <|image|> <|image|> Tot al ? <|assistant|> 12 .50 <|end|>
    visual_index       -1       -1        0         1         2      -1  -1 -1     -1      -1  -1    -1
    loss_weights        0        0        0         0         0       0   0  0      1       1   1     0

`loss_weights` belong to *targets*: position i predicts tokens[i + 1], so its weight is 1 if tokens[i + 1] is part of an
answer or is the token that ends it.

Text typed by a user stays text, even if it looks like a special token. Every such passage is replaced by a mark of
private-use characters before the template is rendered, so all special tokens in the rendered text come from the
template.
A conversation without such passages (nearly all) is tokenized exactly as by transformers' `apply_chat_template`.
"""

import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import tokenizers
from jaxtyping import Float32, Int32

from alignvlm_jax.downloads.stubs import describe_stub
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import open_location
from alignvlm_jax.storage.errors import translated_errors

Message = Mapping[str, Any]

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# An entry of tokenizer_config.json that only this project uses: further tokens that end an answer. Hugging Face folders
# list them in other files.
END_TOKENS = "end_tokens"

# A hidden passage is rendered as OPEN, its number, CLOSE. These characters are hidden too if a user's text has them.
_OPEN, _CLOSE = "\ue000", "\ue001"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
# Prepended to a passage that is encoded separately, so that the tokenizer does not treat it as the start of a text.
_BREAK = "\ue002\ue003\ue002"


class EncodedChat(NamedTuple):
    """One conversation as tokens. The module docstring has a worked example."""

    tokens: Int32[np.ndarray, " n"]
    loss_weights: Float32[np.ndarray, " n"]
    visual_index: Int32[np.ndarray, " n"]


class ChatTokenizer:
    """Encodes conversations and decodes answers.

    Attributes:
      pad_id: id of the padding token.
      image_id: id of the image placeholder.
      end_ids: ids of the tokens that end an answer: the token that the template writes after one, the end of text, and
        further tokens listed in the configuration.
      vocab_size: largest token id plus one.
    """

    def __init__(self, tokenizer_json: str, tokenizer_config: Mapping[str, Any], chat_template: str):
        self._files = (tokenizer_json, dict(tokenizer_config), chat_template)
        self._tokenizer = _load_tokenizer(tokenizer_json)
        self._template = compile_template(chat_template)
        self._names = special_names(tokenizer_config)
        self._end_tokens = tuple(tokenizer_config.get(END_TOKENS, ()))
        added = self._tokenizer.get_added_tokens_decoder()
        # Longest first: a regular expression takes the first alternative that matches, and one token may be a prefix of
        # another.
        specials = sorted((token for token in added.values() if token.special), key=lambda t: -len(t.content))
        if not specials:
            raise UserError(f"{TOKENIZER_FILE}: no special tokens found; a chat template needs them")
        # Special tokens may include the white space around them (lstrip, rstrip).
        self._special = re.compile(
            "|".join(r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in specials)
        )
        self._hidden_pattern = re.compile("|".join([*(re.escape(t.content) for t in specials), _OPEN, _CLOSE]))
        self.image_id = self._named_id("image_token")
        # The padding token never enters attention or loss, so the end of text can replace a missing one.
        self.pad_id = self._named_id("pad_token" if "pad_token" in self._names else "eos_token")
        self.end_ids = self._find_end_ids()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "ChatTokenizer":
        """Reads a folder written by `save` or by transformers.

        Raises:
          UserError: if the folder does not hold the tokenizer of a chat model.
        """
        folder = open_location(folder)
        config_text = _read(folder / CONFIG_FILE)
        try:
            config = json.loads(config_text)
        except json.JSONDecodeError as error:
            raise UserError(f"{folder / CONFIG_FILE}: not valid JSON: {error}") from error
        template = folder / TEMPLATE_FILE
        if not template.exists() and isinstance(config.get("chat_template"), str):
            chat_template = config["chat_template"]  # older folders keep it here
        else:
            chat_template = _read(template)
        try:
            return cls(_read(folder / TOKENIZER_FILE), config, chat_template)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the three files, so that a checkpoint can be read without the original folder."""
        folder = open_location(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer_json, config, chat_template = self._files
        (folder / TOKENIZER_FILE).write_text(tokenizer_json, encoding="utf-8")
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")

    @property
    def chat_template(self) -> str:
        """The text of the template."""
        return self._files[2]

    def __reduce__(self):
        # Compiled templates cannot be pickled, so worker processes compile their own.
        return ChatTokenizer, self._files

    def encode(self, messages: Sequence[Message], tokens_per_image: Sequence[int] = ()) -> EncodedChat:
        """Encodes a complete conversation for training.

        Args:
          messages: the conversation.
          tokens_per_image: number of visual tokens of each image, in order.

        Raises:
          UserError: if the conversation is not valid or has no answer.
        """
        hidden = []
        messages = [_hide_message(message, self._hidden_pattern, hidden) for message in messages]
        rendered = self._render(messages, add_generation_prompt=False)
        answers = self._find_answers(messages, rendered)
        if not answers:
            raise UserError("the conversation has no answer to learn from")
        ids, offsets = self._tokenize(rendered, hidden)
        is_answer = np.zeros(len(ids), bool)
        for start, end in answers:
            # The spans are in the text with marks, the offsets in the text with the original passages.
            start, end = len(_unhide(rendered[:start], hidden)), len(_unhide(rendered[:end], hidden))
            # Any overlap counts: the model must also predict a token that crosses the border to begin its answer.
            is_answer |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        return self._expand(ids, is_answer, tokens_per_image)

    def encode_prompt(self, messages: Sequence[Message], tokens_per_image: Sequence[int] = ()) -> EncodedChat:
        """Encodes a conversation up to the point where the assistant continues. All loss weights are zero."""
        hidden = []
        messages = [_hide_message(message, self._hidden_pattern, hidden) for message in messages]
        ids, _ = self._tokenize(self._render(messages, add_generation_prompt=True), hidden)
        return self._expand(ids, np.zeros(len(ids), bool), tokens_per_image)

    def encode_text(self, text: str) -> Int32[np.ndarray, " n"]:
        """Encodes plain text without a template; nothing in it is treated as a special token."""
        return np.asarray(self._plain_tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token in the tokenizer's file, or None if there is none."""
        return self._tokenizer.token_to_id(token)

    def token_name(self, token_id: int) -> str | None:
        """Returns a token as the tokenizer's file spells it, or None if no token has this id."""
        return self._tokenizer.id_to_token(token_id)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, which `decode` leaves out."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def token_text(self, token_id: int) -> str:
        """Returns a token as it appears in a text, including a space before it.

        Special tokens and tokens that are a part of a character are returned by name. An id without a token (a row that
        pads an embedding table) is "<id>".
        """
        name = self._tokenizer.id_to_token(token_id)
        if name is None:
            return f"<{token_id}>"
        text = self.decode([token_id])
        if not text or "\ufffd" in text:
            return name
        # SentencePiece marks a space with U+2581, and decoding drops it at the beginning of a text.
        return " " + text if name.startswith("\u2581") and not text.startswith(" ") else text

    @functools.cached_property
    def _plain_tokenizer(self) -> tokenizers.Tokenizer:
        """The same tokenizer, but treating special tokens as ordinary text."""
        plain = _load_tokenizer(self._files[0])
        plain.encode_special_tokens = True
        return plain

    @functools.cached_property
    def _continuation_tokenizer(self) -> tokenizers.Tokenizer | None:
        """`_plain_tokenizer` with `_BREAK` as a token, or None if the tokenizer does not need it.

        Only the prepend scheme "first" needs it, which puts a space before the first word of a text and no other.
        """
        if not re.search(r'"prepend_scheme":\s*"first"', self._files[0]):
            return None
        plain = _load_tokenizer(self._files[0])
        plain.encode_special_tokens = True
        plain.add_tokens([tokenizers.AddedToken(_BREAK, normalized=False)])
        return plain

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Writes a conversation as text, with the chat template."""
        try:
            # transformers always defines `tools` and `documents`, so templates may test them.
            variables = {"messages": messages, "tools": None, "documents": None, **self._names}
            return self._template.render(**variables, add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the chat template cannot write this conversation: {error}") from error

    def _find_answers(self, messages: Sequence[Message], rendered: str) -> list[tuple[int, int]]:
        """Returns the spans of the answers in the rendered text, each including the special token that ends it."""
        answers = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            # An answer begins where the prompt before it ends. This requires that the template writes a prompt the same
            # way if more messages follow, which is checked below.
            prompt = self._render(messages[:i], add_generation_prompt=True)
            end = self._special.search(rendered, len(prompt))
            if not rendered.startswith(prompt) or end is None:
                raise UserError(
                    f"the answer in message {i + 1} cannot be located in the text that the chat template writes: a "
                    "template must write what add_generation_prompt writes, the answer, and a special token"
                )
            answers.append((len(prompt), end.end()))
        return answers

    def _tokenize(self, rendered: str, hidden: Sequence[str]) -> tuple[Int32[np.ndarray, " n"], np.ndarray]:
        """Returns token ids and their (start, end) offsets in the rendered text with the hidden passages restored."""
        try:
            rendered.encode("utf-8")
        except UnicodeEncodeError as error:
            # The tokenizer's own error only says that the text is no text.
            around = rendered[max(error.start - 20, 0) : error.end + 20]
            raise UserError(f"the text has half a surrogate pair, which is no character: {around!r}") from error
        # The common case: nothing is hidden, and the tokenizer itself finds the special tokens.
        if not hidden:
            encoding = self._tokenizer.encode(rendered, add_special_tokens=False)
            return np.asarray(encoding.ids, np.int32), np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        # Otherwise the text between the template's special tokens is encoded as plain text, piece by piece.
        ids, offsets, cursor = [], [], 0

        def add_text(text):
            """Encodes a piece of plain text and appends its ids and offsets."""
            nonlocal cursor
            # A text in the middle must not get the space that the tokenizer puts before a text's first word. _BREAK
            # takes it instead, and its token is dropped.
            if cursor and text and self._continuation_tokenizer and _BREAK not in text:
                encoding, skip = self._continuation_tokenizer.encode(_BREAK + text, add_special_tokens=False), 1
            else:
                encoding, skip = self._plain_tokenizer.encode(text, add_special_tokens=False), 0
            shift = cursor - skip * len(_BREAK)
            ids.extend(encoding.ids[skip:])
            offsets.extend((start + shift, end + shift) for start, end in encoding.offsets[skip:])
            cursor += len(text)

        # All special tokens found here come from the template, because those typed by users are still hidden.
        piece_start = 0
        for special in self._special.finditer(rendered):
            add_text(_unhide(rendered[piece_start : special.start()], hidden))
            ids.append(self._tokenizer.token_to_id(special.group().strip()))
            offsets.append((cursor, cursor + len(special.group())))
            cursor += len(special.group())
            piece_start = special.end()
        add_text(_unhide(rendered[piece_start:], hidden))
        return np.asarray(ids, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2)

    def _expand(self, ids: np.ndarray, is_answer: np.ndarray, tokens_per_image: Sequence[int]) -> EncodedChat:
        """Repeats each image token once per visual token and numbers the repetitions."""
        images = np.flatnonzero(ids == self.image_id)  # positions of the image tokens, one per image
        if len(images) != len(tokens_per_image):
            raise UserError(f"the conversation has {len(images)} image marks for {len(tokens_per_image)} images")
        repeats = np.ones(len(ids), np.int64)
        repeats[images] = tokens_per_image
        tokens = np.repeat(ids, repeats)
        visual = np.repeat(ids == self.image_id, repeats)
        visual_index = np.where(visual, np.cumsum(visual) - 1, -1).astype(np.int32)
        loss_weights = np.zeros(len(tokens), np.float32)
        # Weights belong to targets, so they are shifted by one position.
        loss_weights[:-1] = np.repeat(is_answer, repeats)[1:]
        return EncodedChat(tokens, loss_weights, visual_index)

    def _named_id(self, name: str) -> int:
        """Returns the id of the special token that the configuration names `name`."""
        token = self._names.get(name)
        if token is None:
            raise UserError(f"{CONFIG_FILE}: {name} is missing")
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None or not self._special.fullmatch(token):
            raise UserError(f"{CONFIG_FILE}: {name} {token!r} is not a special token of {TOKENIZER_FILE}")
        return token_id

    def _find_end_ids(self) -> tuple[int, ...]:
        """Returns the ids of the tokens that end an answer.

        They are the token that the template writes after the answer of a small conversation, the end of text, and the
        listed `END_TOKENS`.
        """
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rendered = self._render(messages, add_generation_prompt=False)
        ((start, end),) = self._find_answers(messages, rendered)
        ids = [self._tokenizer.token_to_id(self._special.findall(rendered[start:end])[-1].strip())]
        if "eos_token" in self._names and (eos := self._named_id("eos_token")) not in ids:
            ids.append(eos)
        for token in self._end_tokens:
            token_id = self._tokenizer.token_to_id(token)
            if token_id is None:
                raise UserError(f"{CONFIG_FILE}: {END_TOKENS} names {token!r}, which {TOKENIZER_FILE} does not have")
            if token_id not in ids:
                ids.append(token_id)
        return tuple(ids)


def _hide_message(message: Message, pattern: re.Pattern, hidden: list[str]) -> dict[str, Any]:
    """Returns a copy with marks for the passages that look like special tokens, which are appended to `hidden`."""

    def hide(text):
        if not isinstance(text, str):
            raise UserError(f"a message's text must be a string, not {type(text).__name__}")
        return pattern.sub(mark, text)

    def mark(match):
        hidden.append(match.group())
        return f"{_OPEN}{len(hidden) - 1}{_CLOSE}"

    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise UserError(f"a message's role must be 'system', 'user' or 'assistant', not {role!r}")
    if isinstance(content, list | tuple):
        parts, before = [], ""
        for part in content:
            if part.get("type") != "text":
                parts.append(part)
                before = ""
                continue
            shown = hide(part.get("text"))
            text = part["text"]
            # Templates join the texts of adjacent parts. An empty hidden passage breaks a token across the border.
            if before and any(match.start() < len(before) < match.end() for match in pattern.finditer(before + text)):
                hidden.append("")
                shown = f"{_OPEN}{len(hidden) - 1}{_CLOSE}{shown}"
            parts.append({**part, "text": shown})
            before += text
        return {"role": role, "content": parts}
    return {"role": role, "content": hide(content)}


def _unhide(text: str, hidden: Sequence[str]) -> str:
    """Returns the text with its marks replaced by the hidden passages."""
    return _MARK.sub(lambda match: hidden[int(match.group(1))], text)


def _load_tokenizer(tokenizer_json: str) -> tokenizers.Tokenizer:
    """Reads a tokenizer from the text of `tokenizer.json`."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{TOKENIZER_FILE}: not a tokenizer that the `tokenizers` library reads: {error}") from error
    # Some files carry the padding and truncation of their last training run.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the named special tokens of a configuration, for example {"bos_token": "<|begin|>"}.

    Values may be plain strings or AddedToken dicts; extra tokens that transformers nests are included.
    """
    entries = dict(config)
    for nested in ("extra_special_tokens", "model_specific_special_tokens"):
        entries.update(config[nested] if isinstance(config.get(nested), Mapping) else {})
    names = {}
    for name, value in entries.items():
        content = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(content, str):
            names[name] = content
    return names


class _GenerationBlocks(jinja2.ext.Extension):
    """Accepts `{% generation %}`, which some templates use to mark answers for transformers. The text is unchanged."""

    tags = {"generation"}

    def parse(self, parser):
        """Parses the block as its contents."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(chat_template: str) -> jinja2.Template:
    """Compiles a chat template in the environment of transformers' `apply_chat_template`.

    `strftime_now` is missing on purpose: templates that would write today's date fall back to a fixed one, so the data
    do not change from day to day.
    """

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def to_json(value, indent=None):
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(chat_template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{TEMPLATE_FILE}: line {error.lineno}: {error.message}") from error


def _read(path: pathlib.Path) -> str:
    """Returns the text of a file in a tokenizer folder."""
    if reason := describe_stub(path):
        raise UserError(f"{path} {reason}")
    try:
        with translated_errors(str(path)):
            return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file; a tokenizer folder holds {TOKENIZER_FILE}, {CONFIG_FILE} and {TEMPLATE_FILE}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
