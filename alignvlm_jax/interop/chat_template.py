r"""Adapts the chat templates of text models to images.

A chat template is a small Jinja program that renders a conversation as text. Templates of text models expect the
content of each message to be a string; ours is a list of images and texts. A prelude, also written in Jinja, turns each
list into a string with the image token in place of the image. The original template follows unchanged. The same file
serves `ChatTokenizer`, transformers' `apply_chat_template` and vLLM.

If a template writes today's date, another prelude replaces it with a fixed date, so that the same conversation always
gives the same tokens.

Templates of models that reason open the answer themselves: add_generation_prompt writes "<think>\n" after the
assistant's header, but a conversation has no such text before its answers. A model trained on answers would then get
prompts that it has never seen. A frame around the template removes the text from the end of the prompt.
"""

import json
from collections.abc import Mapping

import jinja2

from alignvlm_jax.data.chat import compile_template
from alignvlm_jax.errors import UserError

# The date that Llama 3.1's template writes by default. The macro shadows transformers' function of the same name.
# Exported files contain the text of the preludes, and imports recognize them by it, so it must never change.
_DATE = {
    **{"%-d": "26", "%d": "26", "%m": "07", "%Y": "2024", "%y": "24", "%B": "July", "%b": "Jul"},
    **{"%A": "Friday", "%a": "Fri", "%j": "208", "%H": "00", "%M": "00", "%S": "00"},
}
_DATE_PRELUDE = (
    "{#- Today is 26 July 2024 for ever: the same conversation is always the same tokens. -#}\n"
    "{%- macro strftime_now(format) -%}\n    {{- format"
    + "".join(f" | replace('{code}', '{value}')" for code, value in _DATE.items())
    + " -}}\n{%- endmacro %}\n"
)

# vLLM detects from the form of these loops that the template accepts lists of parts. transformers' sandbox forbids
# list.append, and assignments inside a loop are lost after it unless they are made on a namespace.
_PARTS_PRELUDE = """{#- The template below expects texts: a list of parts becomes one, with the image token inline. -#}
{%- set chat = namespace(messages=[], text='') -%}
{%- for message in messages -%}
    {%- if message['content'] is not defined or message['content'] is none or message['content'] is string -%}
        {%- set chat.messages = chat.messages + [message] -%}
    {%- else -%}
        {%- set chat.text = '' -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {%- set chat.text = chat.text + IMAGE_TOKEN -%}
            {%- elif part['type'] == 'text' -%}
                {%- set chat.text = chat.text + part['text'] -%}
            {%- else -%}
                {{- raise_exception('a part of a message is an image or a text, not ' ~ part['type']) -}}
            {%- endif -%}
        {%- endfor -%}
        {%- set chat.messages = chat.messages + [dict(message, content=chat.text)] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = chat.messages %}
"""

# A `set` block captures what the template writes. trim_blocks removes the line breaks after its tags, and nothing else
# is trimmed, so the template writes the same text as without the frame.
_FRAME_START = "{% set framed %}\n"
_FRAME_END = """{% endset %}
{%- if add_generation_prompt and framed.endswith(OPENING) -%}
    {{- framed[:-LENGTH] -}}
{%- else -%}
    {{- framed -}}
{%- endif -%}
"""


def adapt_to_images(template: str, names: Mapping[str, str], notes: list[str]) -> str:
    """Returns the template with the preludes that it needs to accept images, tested on small conversations.

    Args:
      template: original template.
      names: special tokens by name ("bos_token", ...), including "image_token".
      notes: list to which a sentence for the user is added for each decision.

    Raises:
      UserError: if the template does not render images correctly even with a prelude.
    """
    if "strftime_now" in template and _DATE_PRELUDE not in template:
        template = _DATE_PRELUDE + template
        notes.append(
            "the chat template writes today's date: it now always writes 26 Jul 2024, so that a conversation gives the "
            "same tokens every day"
        )
    # Templates of vision-language models accept lists of parts themselves.
    if not _accepts_parts(template, names):
        image_token = json.dumps(names["image_token"], ensure_ascii=False)
        template = _PARTS_PRELUDE.replace("IMAGE_TOKEN", image_token) + template
        if not _accepts_parts(template, names):
            raise UserError(
                "the chat template does not render the user's text and the image as expected; pass another template "
                "with --chat-template"
            )
    opening = _find_opening(template, names)
    if opening:
        template = (
            _FRAME_START
            + template.removesuffix("\n")  # Jinja drops a line break at the end of a template.
            + _FRAME_END.replace("OPENING", json.dumps(opening, ensure_ascii=False)).replace(
                "LENGTH", str(len(opening))
            )
        )
        notes.append(
            f"the chat template opens every answer with {opening!r}, but conversations have no such text before an "
            "answer: prompts end without it, so that the model answers directly, as it is trained; pass another "
            "template with --chat-template to change that"
        )
    return template


def _find_opening(template: str, names: Mapping[str, str]) -> str:
    """Returns the text that the template writes at the end of a prompt, but not before an answer; "" if none."""
    compiled = compile_template(template)
    variables = {"tools": None, "documents": None, **names}
    question, answer = {"role": "user", "content": "qwestion"}, {"role": "assistant", "content": "annswer"}
    try:
        prompt = compiled.render(messages=[question], add_generation_prompt=True, **variables)
        before, _, _ = compiled.render(messages=[question, answer], add_generation_prompt=False, **variables).partition(
            "annswer"
        )
    except (jinja2.TemplateError, TypeError, ValueError):
        return ""  # `ChatTokenizer` reports it.
    return prompt[len(before) :] if prompt.startswith(before) else ""


def _accepts_parts(template: str, names: Mapping[str, str]) -> bool:
    """Returns whether strings and lists of parts render the same text, and an image renders as the image token."""
    compiled = compile_template(template)
    image_token = names["image_token"]
    # Misspelled, so that they cannot be part of the template's own text.
    texts = {"system": "sistem", "user": "qwestion", "assistant": "annswer"}

    def render(*roles, in_parts=False, image=False):
        messages = []
        for role in roles:
            content = [{"type": "text", "text": texts[role]}] if in_parts else texts[role]
            content = (
                [{"type": "image"}, {"type": "text", "text": texts[role]}] if image and role == "user" else content
            )
            messages.append({"role": role, "content": content})
        variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": False, **names}
        try:
            return compiled.render(**variables)
        except (jinja2.TemplateError, TypeError, ValueError):
            return None

    # Each text must appear exactly once.
    plain = render("user", "assistant")
    if plain is None or any(plain.count(texts[role]) != 1 for role in ("user", "assistant")):
        return False
    if image_token in plain:
        raise UserError(f"the chat template writes {image_token!r} where there is no image: choose another image token")
    if plain != render("user", "assistant", in_parts=True):
        return False
    # A template without support for system messages may refuse one; both forms then render as None.
    if render("system", "user") != render("system", "user", in_parts=True):
        return False
    # Templates of vision-language models may write text around the image token.
    before, _, behind = (render("user", "assistant", image=True) or "").partition(texts["user"])
    return before.count(image_token) == 1 and image_token not in behind
