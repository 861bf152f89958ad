"""Checks of conversations before they are stored, the same for all formats, including opening every image.

A problem is raised as a `Refusal`. A conversation without problems becomes the record to store; its images stay
unchanged byte for byte, except that the pages of a PDF become PNG images.
"""

import dataclasses
import errno
import functools
import itertools
import json
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Sequence
from typing import Any

from etils import epath

from alignvlm_jax.data import pdf
from alignvlm_jax.data.formats.conversation import IMAGE, IMAGE_MARK, Conversation, Message
from alignvlm_jax.data.images import DEFAULT_MAX_PAGES, DEFAULT_MAX_PIXELS, open_image
from alignvlm_jax.data.paths import status
from alignvlm_jax.data.refusal import Refusal
from alignvlm_jax.downloads import hub_cache
from alignvlm_jax.errors import UserError
from alignvlm_jax.locations import is_local
from alignvlm_jax.storage.errors import translated_errors

Record = dict[str, Any]

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")
_MAX_NAMES = 200_000
# Marks of Qwen, MiniCPM, MMMU, InternLM-XComposer, Idefics and others.
_OTHER_MARK = re.compile(r"<\|?(?:image|img|vision)[\w\s-]{0,20}\|?>|\[IMG\]", re.IGNORECASE)
_MAX_PATH = 4096  # the limit of Linux


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits beyond which readable records are refused.

    Attributes:
      image_root: folder that image paths start from and must stay in; by default the folder of the input file.
      follow_links: whether symbolic links may lead out of it.
      max_pixels: larger images are refused.
      max_record_bytes: larger conversations are refused, texts and images together.
    """

    image_root: str | None = None
    follow_links: bool = False
    max_pixels: int = DEFAULT_MAX_PIXELS
    max_record_bytes: int = 64 * 2**20


def check(conversation: Conversation, image_root: str, limits: Limits) -> Record:
    """Returns the record to store: id, source, conversation (as JSON) and the bytes of the images.

    Raises:
      Refusal: if the conversation cannot be used.
    """
    _check_turns(conversation.messages)
    _check_text([conversation.id, conversation.source, *_texts(conversation.messages)])
    # One mark per image, in order.
    marks = sum(part == IMAGE for message in conversation.messages for part in message["content"])
    if marks != len(conversation.images):
        raise Refusal(
            "image marks",
            f"the conversation has {marks} image marks for {len(conversation.images)} images; the text needs a mark "
            f"(<image>) where each image goes{_other_marks(conversation.messages)}",
        )
    # Encoding cannot fail here, because `_check_text` has refused half surrogate pairs.
    budget = _spend_bytes(limits.max_record_bytes, len(_to_json(conversation.messages).encode()))
    images, pages_per_image = [], []
    for i, image in enumerate(conversation.images, 1):
        pages = _read_pages(image, f"image {i}", image_root, limits, budget)
        for data in pages:
            budget = _spend_bytes(budget, len(data))
        images += pages
        pages_per_image.append(len(pages))
    text = _to_json(_repeat_marks(conversation.messages, pages_per_image))
    return {"id": conversation.id, "source": conversation.source, "conversation": text, "images": images}


def _to_json(messages: Sequence[Message]) -> str:
    return json.dumps([_stored_message(message) for message in messages], ensure_ascii=False)


def _repeat_marks(messages: Sequence[Message], pages_per_image: Sequence[int]) -> list[Message]:
    """Returns the messages with one mark for each page of a PDF."""
    numbers = iter(pages_per_image)
    return [
        {
            "role": message["role"],
            "content": [
                copy for part in message["content"] for copy in [part] * (next(numbers) if part == IMAGE else 1)
            ],
        }
        for message in messages
    ]


def _read_pages(image: bytes | str, number: str, image_root: str, limits: Limits, max_bytes: int) -> list[bytes]:
    """Returns the bytes of an image that can be opened, or the pages of a PDF as PNG.

    Args:
      image: bytes of the file, or its path, which may name a page (`FILE.pdf#page=3`).
      number: name of an image without a path.
      image_root: folder that paths start from.
      limits: limits of a record.
      max_bytes: number of bytes that the record may still have.
    """
    name = number if isinstance(image, bytes) else image
    try:
        path, page = (image, None) if isinstance(image, bytes) else pdf.split_page(image)
        data = path if isinstance(path, bytes) else _read_image(path, image_root, limits, max_bytes)
        if not pdf.is_pdf(data):
            if page is not None:
                raise Refusal("unreadable image", f"{name}: not a PDF, so it has no page {page}")
            _check_image(data, name, limits.max_pixels)
            return [data]
        if page is not None:
            return [pdf.to_png(pdf.render_page(data, page, name=str(path), max_pixels=limits.max_pixels))]
        pages, count = pdf.render_pages(data, name=name, max_pixels=limits.max_pixels, max_pages=DEFAULT_MAX_PAGES)
    except Refusal:
        raise
    except UserError as error:
        raise Refusal("unreadable image", str(error)) from error
    if count > len(pages):
        raise Refusal(
            "too large",
            f"{name}: a PDF of {count} pages, more than the limit of {DEFAULT_MAX_PAGES}; name each page that the "
            "record needs (FILE.pdf#page=3), with a mark of its own",
        )
    return [pdf.to_png(page) for page in pages]


def _check_turns(messages: Sequence[Message]) -> None:
    """Checks the roles: an optional system message, then user and assistant in turn, ending with the assistant."""
    if not messages:
        raise Refusal("empty conversation", "the conversation has no messages")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns:
        raise Refusal("empty conversation", "the conversation has no question and no answer")
    if turns[-1] != "assistant":
        raise Refusal("roles", f"the last message has the role {turns[-1]}, expected an answer")
    for i, role in enumerate(turns):
        if role != ("user", "assistant")[i % 2]:
            raise Refusal("roles", f"user and assistant do not take turns: {', '.join(roles[:20])}")
    for i, message in enumerate(messages, 1):
        if not any(part == IMAGE or part["text"].strip() for part in message["content"]):
            raise Refusal("empty conversation", f"message {i} (role {message['role']}) is empty")
        if message["role"] != "user" and IMAGE in message["content"]:
            raise Refusal("image marks", f"message {i} (role {message['role']}) shows an image; only a user can")


def _other_marks(messages: Sequence[Message]) -> str:
    """Returns which marks of other models the texts have, to be added to a message."""
    texts = [part["text"] for message in messages for part in message["content"] if part != IMAGE]
    found = dict.fromkeys(mark for text in texts for mark in _OTHER_MARK.findall(text) if mark != IMAGE_MARK)
    return f". It has {', '.join(list(found)[:4])} of another model: replace that with <image>" if found else ""


def _spend_bytes(budget: int, size: int) -> int:
    """Returns the bytes that are left of the budget."""
    if size > budget:
        raise Refusal("too large", f"a text or image of {size} bytes exceeds the limit, which leaves {budget} bytes")
    return budget - size


def _stored_message(message: Message) -> Message:
    """Returns a message as it is stored. Only a user's message keeps its parts."""
    # Other roles have no images, and many chat templates expect their content to be plain text.
    if message["role"] == "user":
        return message
    return {"role": message["role"], "content": "".join(part["text"] for part in message["content"])}


def _texts(messages: Sequence[Message]) -> list[str]:
    """Returns all texts of the messages."""
    return [part["text"] for message in messages for part in message["content"] if part != IMAGE]


def _check_text(texts: Sequence[str]) -> None:
    """Raises a `Refusal` if a text cannot be stored and tokenized."""
    for text in texts:
        if "\0" in text:
            raise Refusal("text encoding", f"the text has a NUL character: {text[:40]!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refusal("text encoding", f"the text has half a surrogate pair: {text[:40]!r}") from error


def _read_image(name: str, image_root: str, limits: Limits, max_bytes: int) -> bytes:
    """Returns the bytes of an image file under the root."""
    try:
        path = _find_image(name, image_root, limits.follow_links)
        with translated_errors(str(path)):
            file_status = status(path)
        if path.is_dir():
            raise Refusal("image path", f"{name or '(empty path)'}: a folder, expected an image file")
        if not file_status.is_regular:
            raise Refusal("image path", f"{name}: a pipe or a device, expected an image file")
        _spend_bytes(max_bytes, file_status.size)  # before reading, which a huge file would make expensive
        with translated_errors(str(path)):
            return path.read_bytes()
    except FileNotFoundError as error:
        why = _describe_missing(path, image_root) + _spelling(name, image_root)
        raise Refusal("missing image", f"{name}: {why}") from error
    except UnicodeEncodeError as error:
        raise Refusal("image path", f"{name!r}: not a valid path") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Refusal("image path", f"{name}: a loop of symbolic links") from error
        raise Refusal("unreadable image", f"{name}: cannot be opened ({error.strerror})") from error


def _describe_missing(path: epath.Path, image_root: str) -> str:
    """Returns why there is no image at a path under the root, and what to do about it."""
    if is_local(path) and os.path.islink(path):
        return f"a link to {os.readlink(path)}, which does not exist"
    missing = f"no such file in {image_root}"
    if alike := _names_in(str(path.parent)).get(_stem(path.name)):
        how = "capital letters" if alike.lower() == path.name.lower() else "its ending"
        if _composed(alike) == _composed(path.name):
            how = "how its accents are encoded (Unicode NFC or NFD)"
        return f"{missing}, but {alike}, whose name differs in {how}: rename it or change the record"
    archives = [name for name in _names_in(image_root).values() if name.lower().endswith(_ARCHIVES)]
    if archives:
        return f"{missing}; unpack {archives[0]} there, or name the folder that paths start from (--images)"
    return f"{missing}, the folder that paths start from (--images)"


def _spelling(name: str, image_root: str) -> str:
    """Returns a sentence about a path that is spelled as in Windows or in a URL, to be added to a message."""
    for other, what in ((name.replace("\\", "/"), "backslashes"), (urllib.parse.unquote(name), "%-escapes of a URL")):
        if other != name and is_local(image_root) and os.path.isfile(os.path.join(image_root, other)):
            return f". There is {other}: the record has {what} in its path, so change the record"
    return ""


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


@functools.lru_cache(maxsize=64)
def _names_in(folder: str) -> dict[str, str]:
    """Returns the names in a local folder by their stems; remembers them, as images may be missing in thousands."""
    if not is_local(folder) or not os.path.isdir(folder):
        return {}
    with os.scandir(folder) as entries:
        return {_stem(entry.name): entry.name for entry in itertools.islice(entries, _MAX_NAMES)}


def _stem(name: str) -> str:
    """Returns a file's name in small letters and without its ending."""
    return _composed(os.path.splitext(name)[0]).lower()


def _find_image(name: str, image_root: str, follow_links: bool) -> epath.Path:
    """Returns the path of an image, which must not leave the root by `..`, an absolute path or a link."""
    if "\0" in name:
        raise Refusal("image path", f"the image path has a NUL character: {name!r}")
    if len(name) > _MAX_PATH:  # resolving it would take long
        what = f"File name too long: {len(name)} characters. Base64 text is read only if it is of an image"
        raise Refusal("unreadable image", f"{name[:60]}...: {what}")
    if "://" in name:  # in a bucket
        name = name.removeprefix(image_root.rstrip("/") + "/")
        if "://" in name:
            raise Refusal("image path", f"{name}: in a bucket outside the image root {image_root} (--images)")
    # normpath resolves `..` in the text of the path; realpath below resolves links.
    relative = os.path.normpath(os.path.relpath(name, image_root) if os.path.isabs(name) else name)
    if relative.split(os.sep)[0] == os.pardir:
        raise Refusal("image path", f"{name}: outside the image root {image_root} (--images)")
    path = epath.Path(image_root) / relative
    if is_local(path) and not follow_links:
        # In the cache of the Hub, all files are links to their contents in another folder of the cache.
        real, root = os.path.realpath(path), os.path.realpath(hub_cache.cache_of(image_root) or image_root)
        if os.path.commonpath([real, root]) != root:
            if not os.path.exists(real):
                raise Refusal("missing image", f"{name}: {_describe_missing(path, image_root)}")
            raise Refusal(
                "image path", f"{name}: a link leads out of the image root, to {real} (--follow-links allows it)"
            )
    return path


def _check_image(data: bytes, name: str, max_pixels: int) -> None:
    """Raises a `Refusal` if an image cannot be opened."""
    if not data:
        raise Refusal("unreadable image", f"{name}: the file is empty")
    try:
        open_image(data, name=name, max_pixels=max_pixels)
    except UserError as error:
        raise Refusal("unreadable image", str(error)) from error
