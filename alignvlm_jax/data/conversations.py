"""Builds the messages and images of a task from the fields of a record.

The tasks and the fields they read:

    conversation   `conversation` (messages as JSON) and `images`, as `alignvlm prepare` writes them: any number of
                   images and turns; the i-th {"type": "image"} stands for images[i]
    transcribe     `image`, `transcription`: the answer is the text of the page
    qa             `image`, `questions`, `answers`: the questions of the page, in random order
    mixed          either `transcribe` or `qa`, with equal probability. A conversation with both would let the questions
                   be answered from the transcription instead of the page.
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
    """Messages in the format of `chat.ChatTokenizer`, and the encoded images they show, in order."""

    messages: list[Message]
    images: list[bytes]


def make_conversation(
    record: Record, task: Task, rng: np.random.Generator, max_turns: int | None = None
) -> Conversation:
    """Returns the conversation for a task, built from a record.

    Args:
      record: the record; see the module docstring for its fields.
      task: name of the task.
      rng: source of the task's random choices.
      max_turns: largest number of questions, each with its answer; None keeps all. A conversation keeps its first turns
        (later ones may refer to earlier ones) and the images shown in them. A page's questions are drawn at random.

    Raises:
      UserError: if the record lacks a field that the task needs, or the field is not valid.
    """
    if task == "conversation":
        messages = _first_turns(_parse(_field(record, "conversation")), max_turns)
        images = list(_field(record, "images"))
        # `max_turns` may have dropped messages, and with them the last images.
        shown = sum(part["type"] == "image" for message in messages for part in _parts(message))
        if max_turns is None and shown != len(images):
            raise UserError(f"the conversation has {shown} image marks for {len(images)} images")
        return Conversation(messages, images[:shown])
    return _about_page(record, _draw_turns(record, task, rng)[:max_turns])


def make_branches(
    record: Record, task: Task, rng: np.random.Generator, max_turns: int | None = None
) -> list[Conversation]:
    """Returns the conversations of a record that become branches: each question of a page, or all turns together.

    Args:
      record: see `make_conversation`.
      task: see `make_conversation`.
      rng: see `make_conversation`.
      max_turns: see `make_conversation`. A question of a page is a branch of its own, so there is no limit on them.

    Raises:
      UserError: as `make_conversation`.
    """
    if task == "conversation":
        return [make_conversation(record, task, rng, max_turns)]
    return [_about_page(record, [turn]) for turn in _draw_turns(record, task, rng)]


def encoded_images(record: Record) -> Sequence[bytes]:
    """Returns the encoded images of a record of any task."""
    return record["images"] if "images" in record else [record["image"]] if "image" in record else []


def _draw_turns(record: Record, task: Task, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Returns the questions of a page with their answers, in random order, for a task other than "conversation"."""
    if task == "mixed":
        task = "transcribe" if rng.random() < 0.5 else "qa"
    if task == "transcribe":
        return [(TRANSCRIBE_INSTRUCTION, _field(record, "transcription"))]
    if task != "qa":
        raise ValueError(f"task: expected one of {', '.join(FIELDS)}, got {task!r}")
    questions, answers = _field(record, "questions"), _field(record, "answers")
    if len(questions) != len(answers) or not len(questions):
        raise UserError(
            f"expected as many answers as questions and at least one, got {len(questions)} questions and "
            f"{len(answers)} answers"
        )
    return [(questions[i], answers[i]) for i in rng.permutation(len(questions))]


def _about_page(record: Record, turns: Sequence[tuple[str, str]]) -> Conversation:
    """Returns the conversation of these questions and answers about a record's page."""
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    # The page comes before the first question.
    messages[0]["content"].insert(0, {"type": "image"})
    return Conversation(messages, [_field(record, "image")])


def _first_turns(messages: list[Message], max_turns: int | None) -> list[Message]:
    """Returns the messages up to and including the answer to question number `max_turns`."""
    if max_turns is None:
        return messages
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    return messages[: answers[max_turns - 1] + 1] if len(answers) > max_turns else messages


def _parse(text: str) -> list[Message]:
    """Returns the messages of a stored conversation; raises a `UserError` if it is not valid."""
    try:
        messages = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the conversation is not valid JSON: {error}") from error
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError("the conversation is not a list of messages")
    for message in messages:
        for part in _parts(message):
            if not isinstance(part, dict) or part.get("type") not in ("image", "text"):
                raise UserError(f"a part of a message is neither an image nor a text: {str(part)[:60]}")
    return messages


def _parts(message: Message) -> Sequence[Any]:
    """Returns the parts of a message. A message of plain text has none."""
    content = message.get("content")
    return content if isinstance(content, list) else ()


def _field(record: Record, name: str) -> Any:
    """Returns a field of a record; raises a `UserError` if it is missing."""
    if name not in record:
        raise UserError(f"the record has no field {name!r}")
    return record[name]
