"""Trees: conversations about the same images that share one page, and conversations joined into one.

Axis letters: n tokens of one conversation.

The conversations of a tree begin with the same tokens, which include every image. This beginning is the page. The rest
of each conversation is a branch, with every token that it learns. Here are two conversations (i: image placeholder,
capitals: answers) and their tree:

    b u i i q s Y E                 page  b u i i    branches  q s Y E | r s Z Z E
    b u i i r s Z Z E

`packing.py` shows how a tree is written to a bin. Training with a tree gives each conversation the loss that it has
alone.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from alignvlm_jax.data.chat import EncodedChat, Message
from alignvlm_jax.data.packing import PackingConfig


class Tree(NamedTuple):
    """Conversations that share a page.

    Attributes:
      members: indices of the conversations, in the order of the branches. One alone has no branches.
      page_length: number of tokens of the page; 0 for one conversation alone.
    """

    members: tuple[int, ...]
    page_length: int = 0


def plan_trees(chats: Sequence[EncodedChat], images: Sequence[Any], config: PackingConfig) -> list[Tree]:
    """Returns trees that hold every conversation once. None is larger than a bin.

    Conversations that have no images, or that mention an image after their own first words, stay alone. So does one
    whose branch would exceed the branch tokens of a bin.

    Args:
      chats: the conversations; each fits into a bin.
      images: the images that each conversation shows, as a value that is equal for equal images.
      config: limits of a bin.
    """
    # Conversations can share a page if they are equal up to the end of their last image.
    alike: dict[Any, list[int]] = {}
    for i, chat in enumerate(chats):
        end = _end_of_images(chat)
        # The page must end before the first answer.
        can_share = 0 < end <= _first_learned(chat)
        alike.setdefault((images[i], chat.tokens[:end].tobytes()) if can_share else i, []).append(i)
    return [tree for members in alike.values() for tree in _split(chats, members, config)]


def _split(chats: Sequence[EncodedChat], members: Sequence[int], config: PackingConfig) -> Iterator[Tree]:
    """Yields trees of conversations that can share a page, as few as the limits of a bin allow in this order."""
    if len(members) == 1:
        yield Tree((members[0],))
        return
    page = _page_length([chats[i] for i in members])
    room = min(config.tokens_per_bin - page, config.branch_tokens)
    branch, tokens = [], 0
    for i in members:
        length = len(chats[i].tokens) - page
        if length > room:
            yield Tree((i,))
            continue
        if tokens + length > room or len(branch) == config.examples_per_bin:
            yield _tree(branch, page)
            branch, tokens = [], 0
        branch.append(i)
        tokens += length
    if branch:
        yield _tree(branch, page)


def _tree(members: Sequence[int], page: int) -> Tree:
    return Tree(tuple(members), page if len(members) > 1 else 0)


def _page_length(chats: Sequence[EncodedChat]) -> int:
    """Returns the length of the longest common beginning from which no conversation learns anything."""
    length = min(_first_learned(chat) for chat in chats)
    first = chats[0].tokens[:length]
    differs = np.any([chat.tokens[:length] != first for chat in chats[1:]], axis=0)
    return int(np.argmax(differs)) if differs.any() else length


def _end_of_images(chat: EncodedChat) -> int:
    """Returns the number of tokens up to the end of the last image; 0 without images."""
    visual = np.flatnonzero(chat.visual_index >= 0)
    return int(visual[-1]) + 1 if len(visual) else 0


def _first_learned(chat: EncodedChat) -> int:
    """Returns the position from which the first target with weight is predicted."""
    return int(np.argmax(chat.loss_weights > 0))


def join_branches(chats: Sequence[EncodedChat], page: int) -> tuple[EncodedChat, Int32[np.ndarray, " n"]]:
    """Returns the tokens of a tree, the page and then its branches, and the branch of each token."""
    first = EncodedChat(*(field[:page] for field in chats[0]))
    parts = [first, *(EncodedChat(*(field[page:] for field in chat)) for chat in chats)]
    branch_ids = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.tokens) for part in parts])
    return EncodedChat(*(np.concatenate(fields) for fields in zip(*parts, strict=True))), branch_ids


def joint_key(messages: Sequence[Message]) -> Any | None:
    """Returns a value that is equal for conversations that can be joined into one; None if it has to stay alone.

    A conversation can follow another one if it shows its images with its first question, and nothing else but a system
    message comes before them. The images then need no second mention.
    """
    system = [message for message in messages if message.get("role") == "system"]
    turns = messages[len(system) :]
    if len(turns) < 2 or messages[: len(system)] != system:
        return None
    if [message.get("role") for message in turns] != ["user", "assistant"] * (len(turns) // 2):
        return None
    has_text = any(part["type"] == "text" and str(part.get("text")).strip() for part in _parts(turns[0]))
    shows_later = any(part["type"] == "image" for message in turns[1:] for part in _parts(message))
    shown = sum(part["type"] == "image" for part in _parts(turns[0]))
    return (str(system), shown) if has_text and shown and not shows_later else None


def join_messages(conversations: Sequence[Sequence[Message]]) -> list[Message]:
    """Returns the conversations as one of several turns. Only the first one shows the images."""
    later = [
        _without_images(message)
        for messages in conversations[1:]
        for message in itertools.dropwhile(lambda message: message.get("role") == "system", messages)
    ]
    return [*conversations[0], *later]


def _without_images(message: Message) -> Mapping[str, Any]:
    if not _parts(message):
        return message
    parts = [part for part in _parts(message) if part["type"] != "image"]
    # A line break often separates the image from the question in one text.
    first = {**parts[0], "text": parts[0]["text"].lstrip()} if parts else None
    return {**message, "content": [first, *parts[1:]] if parts else []}


def _parts(message: Message) -> Sequence[Mapping[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else ()
