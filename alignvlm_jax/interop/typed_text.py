"""Keeps text that users type from becoming special tokens in engines that render a conversation before they tokenize.

vLLM and transformers write a conversation as one string and then tokenize it. In that string, an image token typed by a
user looks like one written by the chat template. An exported folder therefore marks text where it is still known to be
text, in the template, and removes the marks where special tokens are already found, in the tokenizer:

    message           a<|image|>b
    rendered          a<MARK|image|>b      a prelude in front of the chat template inserts marks
    special tokens    none                 the tokenizer looks for special tokens before it normalizes text
    normalized        a<|image|>b          a rule in front of the tokenizer's normalizer removes marks

The token ids are those of `ChatTokenizer`. `mark_typed_text` changes the two files of an exported folder,
`unmark_typed_text` restores them.
"""

import json
from collections.abc import Mapping
from typing import Any

# Two different characters: `_mark` inserts a mark into a mark that is typed, and one pass over the text removes it.
_OPEN, _CLOSE = "\ue004", "\ue005"
MARK = _OPEN + _CLOSE
_RULE = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
# vLLM writes it as text where a message has a part of type "prompt_embeds", and looks for it after tokenizing.
_ENGINE_TOKENS = ("<prompt_embeds>",)

# Exported files contain these texts, and imports recognize the prelude by its first and last line, so they must never
# change. vLLM detects from the loops that the template accepts lists of parts.
_FIRST_LINE = "{#- Text that looks like a special token gets a mark, which the tokenizer removes: it stays text. -#}\n"
_PRELUDE = """{%- macro typed_text(text) -%}
    {{- textFILTERS -}}
{%- endmacro -%}
{%- set typed = namespace(messages=[], parts=[], seam='') -%}
{%- for message in messages -%}
    {%- if message['content'] is string -%}
        {%- set typed.messages = typed.messages + [dict(message, content=typed_text(message['content']))] -%}
    {%- elif message['content'] is defined and message['content'] is sequence -%}
        {%- set typed.parts = [] -%}
        {%- set typed.seam = '' -%}
        {%- for part in message['content'] -%}
            {%- if part['text'] is string -%}
                {%- set typed.parts = typed.parts + [dict(part, text=typed.seam ~ typed_text(part['text']))] -%}
                {%- set typed.seam = MARK -%}
            {%- else -%}
                {%- set typed.parts = typed.parts + [part] -%}
                {%- set typed.seam = '' -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set typed.messages = typed.messages + [dict(message, content=typed.parts)] -%}
    {%- else -%}
        {%- set typed.messages = typed.messages + [message] -%}
    {%- endif -%}
{%- endfor -%}
"""
_LAST_LINE = "{%- set messages = typed.messages %}\n"


def mark_typed_text(vocabulary: Mapping[str, Any], template: str) -> tuple[dict[str, Any], str]:
    """Returns a parsed tokenizer.json and a chat template that keep typed text from becoming special tokens."""
    vocabulary, template = unmark_typed_text(vocabulary, template)
    normalizer = vocabulary.get("normalizer")
    rule = _RULE if normalizer is None else {"type": "Sequence", "normalizers": [_RULE, normalizer]}
    filters = "".join(
        f" | replace({_literal(text)}, {_literal(_mark(text))})" for text in [MARK, *_openings(vocabulary)]
    )
    prelude = _PRELUDE.replace("FILTERS", filters).replace("MARK", _literal(MARK))
    return {**vocabulary, "normalizer": rule}, _FIRST_LINE + prelude + _LAST_LINE + template


def unmark_typed_text(vocabulary: Mapping[str, Any], template: str) -> tuple[dict[str, Any], str]:
    """Returns the parsed tokenizer.json and the chat template that `mark_typed_text` was called with.

    Files without marks are returned unchanged.
    """
    normalizer = vocabulary.get("normalizer")
    if normalizer == _RULE:
        vocabulary = {**vocabulary, "normalizer": None}
    elif normalizer and (normalizer.get("normalizers") or [None])[0] == _RULE:
        vocabulary = {**vocabulary, "normalizer": normalizer["normalizers"][1]}
    if template.startswith(_FIRST_LINE):
        template = template.partition(_LAST_LINE)[2]
    return dict(vocabulary), template


def _mark(text: str) -> str:
    """Returns the text with a mark after its first character."""
    return text[0] + MARK + text[1:]


def _openings(vocabulary: Mapping[str, Any]) -> list[str]:
    """Returns the passages to be marked: the shortest beginning of each special token that no other token contains.

    The 256 special tokens of Llama 3 have one beginning, "<|". Marks in other text with the same beginning are
    harmless, because they are removed. But tokens that are not special are found before marks are removed, too, and
    must stay whole.
    """
    entries = vocabulary.get("added_tokens") or ()
    others = [*(entry["content"] for entry in entries if not entry.get("special")), *_ENGINE_TOKENS]
    openings = set()
    for special in (entry["content"] for entry in entries if entry.get("special")):
        beginnings = (special[:end] for end in range(2, len(special)))
        openings.add(next((b for b in beginnings if not any(b in other for other in others)), special))
    # A token of one character cannot be broken. A passage that begins with another one is marked with it.
    openings = {opening for opening in openings if len(opening) > 1}
    return sorted(a for a in openings if not any(a != b and a.startswith(b) for b in openings))


def _literal(text: str) -> str:
    """Returns the text as a Jinja string, in which marks are escaped, because they would be invisible."""
    return json.dumps(text, ensure_ascii=False).replace(_OPEN, "\\ue004").replace(_CLOSE, "\\ue005")
