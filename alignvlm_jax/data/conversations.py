"""What is said about the pictures of a record: from its fields to messages and images.

A task names the fields it reads:

    conversation   `conversation` (messages as JSON) and `images`, as `tools/prepare_data.py` writes them: none, one or
                   several images, one or several turns; the i-th {"type": "image"} stands for images[i]
    transcribe     `image`, `transcription`: the page is to be written out
    qa             `image`, `questions`, `answers`: its questions, in random order
    mixed          one of the last two, by a fair coin: a conversation holding both would let the questions be answered
                   from the transcription instead of the page
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from alignvlm_jax.data.chat import Message
from alignvlm_jax.errors import UserError

Record = Mapping[str, Any]
Task = Literal["conversation", "transcribe", "qa", "mixed"]

FIELDS: Mapping[Task, tuple[str, ...]] = {
    "conversation": ("conversation", "images"),
    "transcribe": ("image", "transcription"),
    "qa": ("image", "questions", "answers"),
    "mixed": ("image", "transcription", "questions", "answers"),
}
"""The fields of a record that a task reads."""

TRANSCRIBE_INSTRUCTION = "Read the page."


class Conversation(NamedTuple):
    """Messages as `chat.ChatTokenizer` takes them, and the files of the images they show, in order."""

    messages: list[Message]
    images: list[bytes]


def make_conversation(
    record: Record, task: Task, rng: np.random.Generator, max_turns: int | None = None
) -> Conversation:
    """The conversation that a task makes of a record.

    Args:
      record: its fields; see the module docstring.
      task: which of them to read.
      rng: for what is random in the task.
      max_turns: at most so many questions with their answers: of a conversation the first ones (later ones may speak of
        earlier ones), with the images shown in them, of a page's questions any. None keeps all.

    Raises:
      UserError: the record has not what the task needs.
    """
    if task == "conversation":
        messages = _first_turns(_parse(_field(record, "conversation")), max_turns)
        images = list(_field(record, "images"))
        shown = sum(part["type"] == "image" for message in messages for part in _parts(message))
        if max_turns is None and shown != len(images):
            raise UserError(f"the conversation has {shown} image marks for {len(images)} images")
        return Conversation(messages, images[:shown])
    if task == "mixed":
        task = "transcribe" if rng.random() < 0.5 else "qa"
    if task == "transcribe":
        turns = [(TRANSCRIBE_INSTRUCTION, _field(record, "transcription"))]
    elif task == "qa":
        questions, answers = _field(record, "questions"), _field(record, "answers")
        if len(questions) != len(answers) or not len(questions):
            raise UserError(f"the record has {len(questions)} questions and {len(answers)} answers")
        turns = [(questions[i], answers[i]) for i in rng.permutation(len(questions))[:max_turns]]
    else:
        raise ValueError(f"task: expected one of {', '.join(FIELDS)}, got {task!r}")
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    messages[0]["content"].insert(0, {"type": "image"})  # Vision first.
    return Conversation(messages, [_field(record, "image")])


def _first_turns(messages: list[Message], max_turns: int | None) -> list[Message]:
    """The messages through the answer to the `max_turns`-th question."""
    if max_turns is None:
        return messages
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    return messages[: answers[max_turns - 1] + 1] if len(answers) > max_turns else messages


def _parse(text: str) -> list[Message]:
    try:
        messages = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the conversation is not valid JSON: {error}") from error
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError("the conversation is not a list of messages")
    for message in messages:
        for part in _parts(message):
            if not isinstance(part, dict) or part.get("type") not in ("image", "text"):
                raise UserError(f"a part of a message is neither an image nor text: {str(part)[:60]}")
    return messages


def _parts(message: Message) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else ()


def _field(record: Record, name: str) -> Any:
    if name not in record:
        raise UserError(f"the record has no field {name!r}")
    return record[name]
