"""Reads chat messages in the shapes of OpenAI and of transformers.

    role        user, assistant, system; developer counts as system
    content     text, or a list of parts

    part                                                              shape of
    {"type": "text", "text": "Total?"}                                both
    {"type": "input_text" or "output_text", "text": "Total?"}         OpenAI's Responses
    {"type": "image_url", "image_url": {"url": "data:..."}}           OpenAI's Chat Completions
    {"type": "input_image", "image_url": "data:..."}                  OpenAI's Responses
    {"type": "image", "image": IMAGE}                                 transformers; also path, url or base64
    {"type": "image"}                                                 this project: the next of the separate images

An IMAGE is any source of `data/image_sources.py`. The result has messages for `chat.ChatTokenizer`, with {"type":
"image"} where an image goes, and the images in the same order:

    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "Total?"}]}
    -> {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Total?"}]} and [URL]
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from alignvlm_jax.data.chat import Message
from alignvlm_jax.data.image_sources import ImageSource
from alignvlm_jax.errors import UserError

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXT = ("text", "input_text", "output_text")
_OTHER_MEDIA = {
    "input_audio": "audio",
    "audio": "audio",
    "video": "video",
    "video_url": "video",
    "input_file": "a file",
    "file": "a file",
}
_TOOLS = ("tool_calls", "function_call", "tool_call_id")


class Chat(NamedTuple):
    """A conversation up to the model's next turn.

    Attributes:
      messages: messages for `chat.ChatTokenizer`.
      images: sources of the images, in the order of their marks.
    """

    messages: list[Message]
    images: list[ImageSource]


def read_messages(messages: Sequence[Mapping[str, Any]], images: Sequence[ImageSource] = ()) -> Chat:
    """Returns a conversation in the project's own shape.

    Args:
      messages: messages in the shapes of the module docstring. The last one is the user's.
      images: images of the parts {"type": "image"}, in order.

    Raises:
      UserError: if a message is in none of the shapes, or the user is not the last to speak.
    """
    if isinstance(messages, Mapping | str) or not isinstance(messages, Sequence):
        raise UserError('messages: expected a list such as [{"role": "user", "content": "What is the total?"}]')
    if not messages:
        raise UserError("messages: the list is empty; the last message must be the user's")
    unused, found, result = list(images), [], []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: expected an object with role and content, got {type(message).__name__}")
        role = _role(message, where)
        if role == "system" and number > 1:
            raise UserError(f"{where}: a system message must be the first")
        parts = [_part(part, f"{where}, part {i}", unused) for i, part in enumerate(_parts(message, where), 1)]
        if role != "user" and any(image is not None for _, image in parts):
            raise UserError(f"{where}: only the user can show an image, not the role {message['role']!r}")
        found += [image for _, image in parts if image is not None]
        shown = [part for part, _ in parts]
        if not any(part["type"] == "image" or part["text"].strip() for part in shown):
            raise UserError(f"{where}: the content is empty")
        # Many chat templates expect plain text of other roles.
        content = shown if role == "user" else "".join(part["text"] for part in shown)
        result.append({"role": role, "content": content})
    _check_turns([message["role"] for message in result])
    if unused:
        raise UserError(f'{len(unused)} of the images have no place: put {{"type": "image"}} where each one goes')
    return Chat(result, found)


def _check_turns(roles: Sequence[str]) -> None:
    """Raises a `UserError` unless user and assistant take turns, from the user to the user."""
    turns = roles[1:] if roles[0] == "system" else roles
    for i, role in enumerate(turns):
        if role != ("user", "assistant")[i % 2]:
            raise UserError(f"messages: user and assistant must take turns, got {', '.join(roles[:20])}")
    if len(turns) % 2 == 0:
        raise UserError(f"messages: the last one must be the user's, got the roles {', '.join(roles[:20])}")


def _role(message: Mapping[str, Any], where: str) -> str:
    """Returns the role of a message."""
    role = message.get("role")
    for name in _TOOLS:
        if message.get(name):
            raise UserError(f"{where}: has {name}, but the model calls no tools. Leave the message out")
    if role in ("tool", "function"):
        raise UserError(f"{where}: has the role {role!r}, but the model calls no tools. Leave the message out")
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(f"{where}: expected a role of {', '.join(_ROLES)}, got {repr(role)[:60]}")
    return _ROLES[role]


def _parts(message: Mapping[str, Any], where: str) -> list[Any]:
    """Returns the parts of a message's content."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        kind = "missing" if content is None else f"of type {type(content).__name__}"
        raise UserError(f"{where}: the content is {kind}, expected text or a list of parts")
    return list(content)


def _part(part: Any, where: str, unused: list[ImageSource]) -> tuple[dict[str, str], ImageSource | None]:
    """Returns a part in the project's shape, and its image; takes images that are given apart from `unused`."""
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise UserError(f'{where}: expected an object with a type, such as {{"type": "text", "text": "Total?"}}')
    if kind in _TEXT:
        if not isinstance(part.get("text"), str):
            raise UserError(f"{where}: the text is {type(part.get('text')).__name__}, expected a string")
        return {"type": "text", "text": part["text"]}, None
    if kind in ("image", "image_url", "input_image"):
        return {"type": "image"}, _image(part, where, unused)
    if kind in _OTHER_MEDIA:
        raise UserError(f"{where}: the model reads text and images, not {_OTHER_MEDIA[kind]} ({kind!r}). Leave it out")
    raise UserError(f"{where}: unknown type {kind[:60]!r}; expected text, image_url or image")


def _image(part: Mapping[str, Any], where: str, unused: list[ImageSource]) -> ImageSource:
    """Returns the image of a part."""
    if part.get("file_id"):
        raise UserError(f"{where}: names a file at OpenAI (file_id). Send the image as a data URL")
    for name in ("image", "image_url", "path", "url"):
        if (value := part.get(name)) is not None:
            return _url(value, where) if name == "image_url" else value
    if (text := part.get("base64")) is not None:
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError, TypeError) as error:
            raise UserError(f"{where}: the base64 text of the image cannot be decoded ({error})") from error
    if part["type"] != "image":
        raise UserError(f"{where}: has no image_url")
    if not unused:
        raise UserError(f'{where}: there is no image for it. Write {{"type": "image", "image": IMAGE}}')
    return unused.pop(0)


def _url(value: Any, where: str) -> ImageSource:
    """Returns the URL of an image, which is text or an object."""
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str) or not url:
        raise UserError(f'{where}: image_url must be text or {{"url": TEXT}}')
    return url
