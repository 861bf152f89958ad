"""A chat template made to take images.

A chat template is a small program that writes a conversation down. Those of text models expect each message's content
to be a string; ours are lists of images and texts. So a prelude is put in front, in the template's own language, that
turns each list into a string with the image token where the image is. The template behind it is left as it was, and
one file serves `ChatTokenizer`, transformers' `apply_chat_template` and vLLM alike.

A template that writes today's date is given a date that stays: the same conversation is always the same tokens.
"""

import json
from collections.abc import Mapping

import jinja2

from alignvlm_jax.data.chat import compile_template
from alignvlm_jax.errors import UserError

# The day that Llama 3.1's template writes where it is told none. A macro hides transformers' function of that name.
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

# The loops are spelled so that vLLM sees that this template takes lists of parts. A sandbox forbids list.append, and
# an assignment inside a loop ends with it unless it is to a namespace.
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


def for_images(template: str, names: Mapping[str, str], notes: list[str]) -> str:
    """The template with what it needs in front of it to take images, tried out on small conversations.

    Args:
      template: as the folder has it.
      names: of the special tokens, the image token's among them.
      notes: takes a sentence for the user where something was decided.

    Raises:
      UserError: it cannot be made to.
    """
    if "strftime_now" in template and _DATE_PRELUDE not in template:
        template = _DATE_PRELUDE + template
        notes.append(
            "the chat template writes the day's date: it now always writes 26 Jul 2024, so that a conversation is the "
            "same tokens every day"
        )
    if _takes_parts(template, names):
        return template
    image_token = json.dumps(names["image_token"], ensure_ascii=False)
    wrapped = _PARTS_PRELUDE.replace("IMAGE_TOKEN", image_token) + template
    if not _takes_parts(wrapped, names):
        raise UserError(
            "the chat template writes neither a user's text nor an image where they belong; give another with "
            "--chat-template"
        )
    return wrapped


def _takes_parts(template: str, names: Mapping[str, str]) -> bool:
    """Whether texts come out the same as strings and as lists of parts, and an image as the image token."""
    compiled = compile_template(template)
    image_token = names["image_token"]
    # Words that no template is likely to write itself.
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

    plain = render("user", "assistant")
    if plain is None or any(plain.count(texts[role]) != 1 for role in ("user", "assistant")):
        return False
    if image_token in plain:
        raise UserError(f"the chat template writes {image_token!r} where there is no image: name another image token")
    if plain != render("user", "assistant", in_parts=True):
        return False
    # A template that knows no system message may refuse one in either form.
    if render("system", "user") != render("system", "user", in_parts=True):
        return False
    # Templates of models that see may write more about an image than its token.
    before, _, behind = (render("user", "assistant", image=True) or "").partition(texts["user"])
    return before.count(image_token) == 1 and image_token not in behind
