"""May this conversation be trained on? The one place where records of every format are checked, and images opened.

Whatever is wrong is a `Refusal` that says so; what passes is a record as it is stored, its images byte for byte what
they were.
"""

import dataclasses
import errno
import json
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from alignvlm_jax.data.formats.conversation import IMAGE, Conversation, Message, Refusal
from alignvlm_jax.data.images import DEFAULT_MAX_PIXELS, open_image
from alignvlm_jax.data.paths import is_local, status
from alignvlm_jax.errors import UserError

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is refused although it could be read.

    image_root: the folder that image paths start from and may not lead out of; by default that of the input file.
    follow_links: let symbolic links lead out of it.
    max_pixels: refuse larger images.
    max_record_bytes: refuse conversations that are larger, texts and images together.
    """

    image_root: str | None = None
    follow_links: bool = False
    max_pixels: int = DEFAULT_MAX_PIXELS
    max_record_bytes: int = 64 * 2**20


def check(conversation: Conversation, image_root: str, limits: Limits) -> Record:
    """The record to store: id, source, conversation (as JSON) and the images' bytes."""
    _check_turns(conversation.messages)
    text = json.dumps([_plain(message) for message in conversation.messages], ensure_ascii=False)
    _check_text([conversation.id, conversation.source, *_texts(conversation.messages)])
    marks = sum(part == IMAGE for message in conversation.messages for part in message["content"])
    if marks != len(conversation.images):
        raise Refusal("image marks", f"{marks} image marks for {len(conversation.images)} images")
    budget = _spend(limits.max_record_bytes, len(text.encode()))
    images = []
    for i, image in enumerate(conversation.images, 1):
        data = image if isinstance(image, bytes) else _read_image(image, image_root, limits, budget)
        budget = _spend(budget, len(data))
        _check_image(data, f"image {i}" if isinstance(image, bytes) else image, limits.max_pixels)
        images.append(data)
    return {"id": conversation.id, "source": conversation.source, "conversation": text, "images": images}


def _check_turns(messages: Sequence[Message]) -> None:
    """An optional word of the system, then user and assistant in turn, the assistant last."""
    if not messages:
        raise Refusal("empty conversation", "the conversation has no messages")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns:
        raise Refusal("empty conversation", "the conversation has no user and no answer")
    if turns[-1] != "assistant":
        raise Refusal("roles", f"the last message is the {turns[-1]}'s, not an answer")
    for i, role in enumerate(turns):
        if role != ("user", "assistant")[i % 2]:
            raise Refusal("roles", f"user and assistant do not take turns: {', '.join(roles[:20])}")
    for i, message in enumerate(messages, 1):
        if not any(part == IMAGE or part["text"].strip() for part in message["content"]):
            raise Refusal("empty conversation", f"message {i}, the {message['role']}'s, is empty")
        if message["role"] != "user" and IMAGE in message["content"]:
            raise Refusal("image marks", f"message {i}, the {message['role']}'s, shows an image")


def _spend(budget: int, size: int) -> int:
    if size > budget:
        raise Refusal("too large", f"{size} bytes of text or image, where the limit leaves {budget}")
    return budget - size


def _plain(message: Message) -> Message:
    """Only a user's message keeps its parts: many chat templates expect answers to be plain text."""
    if message["role"] == "user":
        return message
    return {"role": message["role"], "content": "".join(part["text"] for part in message["content"])}


def _texts(messages: Sequence[Message]) -> list[str]:
    return [part["text"] for message in messages for part in message["content"] if part != IMAGE]


def _check_text(texts: Sequence[str]) -> None:
    for text in texts:
        if "\0" in text:
            raise Refusal("text encoding", f"a NUL character in {text[:40]!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refusal("text encoding", f"half a surrogate pair, no character, in {text[:40]!r}") from error


def _read_image(name: str, image_root: str, limits: Limits, max_bytes: int) -> bytes:
    try:
        path = _find_image(name, image_root, limits.follow_links)
        found = status(path)
        if not found.is_regular:
            raise Refusal("image path", f"{name}: not an image file but a folder or a device")
        _spend(max_bytes, found.size)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise Refusal("missing image", f"{name}: no such file in {image_root}") from error
    except UnicodeEncodeError as error:
        raise Refusal("image path", f"{name!r}: not a path") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Refusal("image path", f"{name}: a loop of symbolic links") from error
        raise Refusal("unreadable image", f"{name}: cannot be opened ({error.strerror})") from error


def _find_image(name: str, image_root: str, follow_links: bool) -> epath.Path:
    """The path of an image, which may not lie outside the root, be it by `..`, by an absolute path or by a link."""
    if "\0" in name:
        raise Refusal("image path", f"a NUL character in the image path {name!r}")
    relative = os.path.normpath(os.path.relpath(name, image_root) if os.path.isabs(name) else name)
    if relative.split(os.sep)[0] == os.pardir:
        raise Refusal("image path", f"{name}: outside the image root {image_root}")
    path = epath.Path(image_root) / relative
    if is_local(path) and not follow_links:
        real, root = os.path.realpath(path), os.path.realpath(image_root)
        if os.path.commonpath([real, root]) != root:
            raise Refusal(
                "image path", f"{name}: a link leads out of the image root to {real} (--follow-links allows it)"
            )
    return path


def _check_image(data: bytes, name: str, max_pixels: int) -> None:
    if not data:
        raise Refusal("unreadable image", f"{name}: the file is empty")
    try:
        open_image(data, name=name, max_pixels=max_pixels)
    except UserError as error:
        raise Refusal("unreadable image", str(error)) from error
