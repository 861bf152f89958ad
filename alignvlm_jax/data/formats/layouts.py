r"""Turns a record of any common layout, from JSON or Parquet, into a conversation. docs/data.md lists the publishers.

    images ["a.png"]       | messages      [{role: "user", content: "<image>What is this?"}, {role: "assistant", ...}]
                             or content as [{type: "image"}, {type: "text", text: "What is this?"}]
    image "a.png"          | conversations [{from: "human", value: "<image>\nWhat is this?"}, {from: "gpt", ...}]
    images [{bytes, path}] | texts         [{user: "What is this?", assistant: "A bus.", source: "vqav2"}]
    images ["a.png"]       | query "<image>What is this?", response "A bus.", history [["Hello?", "Hello."]]

Marks are strict: a text has one `<image>` per image. There are two exceptions. Content with parts states the positions
of images itself, and `<image>` in its texts stays text. Pairs of a question and an answer without any mark are about
all images of the record, which come first.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from alignvlm_jax.data.formats import fields
from alignvlm_jax.data.formats.conversation import (
    IMAGE,
    IMAGE_MARK,
    TOOL_ROLES,
    Conversation,
    FormatOptions,
    Message,
    Refusal,
    expect_object,
    expect_role,
    expect_text,
    text_message,
    text_or_default,
    text_part,
)

_DIALOGUES = {
    "messages": "a message",
    "conversations": "a turn",
    "conversation": "a turn",
    "texts": "a text",
    "questions": "a question",
}
_ROLES = ("from", "role")
_CONTENTS = ("value", "content", "text")
_ASKED = ("user", "human", "query", "question")
_ANSWERED = ("assistant", "gpt", "bot", "response", "answer")
_INSTRUCTIONS = ("instruction",)
_INPUTS = ("input", "inputs")
_QUESTIONS = ("query", "question", "prompt", "prefix")
_ANSWERS = ("output", "outputs", "response", "answer", "answers", "completion", "suffix")
_CAPTIONS = ("caption", "txt", "text")
_SYSTEMS = ("system", "system_prompt")
_CHOICES = ("choices", "options")
# Fields of a message by which ms-swift, OpenAI and Axolotl exclude an answer from the loss.
_WEIGHTS = ("loss", "weight", "train")
_PLACEHOLDERS = ("<bbox>", "<ref-object>")
_IDS = ("id", "uid", "sample_id", "question_id", "__key__")
_SOURCES = ("source", "data_source", "dataset_name")
# Qwen-VL's and ms-swift's way to name an image in the text. In HTML, <img> has no closing tag.
_NAMED_IMAGE = re.compile(r"<img>([^<>\n]+)</img>")

# The columns to read from a Parquet file.
COLUMNS = (
    *(
        *fields.IMAGE_FIELDS,
        *fields.CAPTIONED_FIELDS,
        "image_[0-9]*",
        "image[0-9]*",
        "video",
        "videos",
        "audio",
        "audios",
    ),
    *(*_DIALOGUES, *_INSTRUCTIONS, *_INPUTS, *_QUESTIONS, *_ANSWERS, *_CAPTIONS, *_SYSTEMS, *_IDS, *_SOURCES),
    *("history", "tools", "objects", "choices", "options"),
)


def to_conversation(
    record: Mapping[str, Any],
    where: str,
    *,
    default_id: str,
    default_source: str,
    options: FormatOptions,
    images: Sequence[bytes | str | None] | None = None,
) -> Conversation:
    """Returns the conversation of a record.

    Args:
      record: fields of the record.
      where: file and record, for reports.
      default_id: id if the record has none.
      default_source: name of the data set if neither the options nor the record state it.
      options: settings of the format.
      images: images of the record if they are not in its fields.

    Raises:
      Refusal: if the record cannot be read.
    """
    fields.refuse_other_media(record)
    _refuse_placeholders(record)
    if images is None:
        # In a conversation, a field such as file_name may name the text it was made from.
        more = () if has_conversation(record) else fields.CAPTIONED_FIELDS
        images = fields.record_images(record, (*fields.IMAGE_FIELDS, *more))
    try:
        messages = _messages(record, images, options.instruction)
        messages, images = _place_images(_with_system(messages, record), images)
    except RecursionError as error:
        raise Refusal("unreadable record", "the record is nested too deeply") from error
    source = next((record[name] for name in _SOURCES if isinstance(record.get(name), str) and record[name]), None)
    return Conversation(
        where, record_id(record, default_id), options.source or source or default_source, messages, images
    )


def record_id(record: Mapping[str, Any], default: str) -> str:
    """Returns the id of a record."""
    return text_or_default(fields.first_present(record, _IDS), default)


def has_conversation(record: Mapping[str, Any]) -> bool:
    """Returns whether a record holds turns, or a question and its answer, so that it is more than a caption."""
    asked = fields.first_present(record, (*_INSTRUCTIONS, *_INPUTS, *_QUESTIONS))
    answered = fields.first_present(record, _ANSWERS)
    return fields.first_present(record, tuple(_DIALOGUES)) is not None or asked is not None and answered is not None


def caption(record: Mapping[str, Any]) -> Any:
    """Returns the caption of a record, or None."""
    return fields.first_present(record, _CAPTIONS)


def _messages(record: Mapping[str, Any], images: Sequence[bytes | str | None], instruction: str) -> list[Message]:
    """Returns the messages. A part that is an image may still have a `source` or an `index`."""
    has_images = any(image is not None for image in images)
    for name, entry in _DIALOGUES.items():
        value = record.get(name)
        if fields.is_absent(value):
            continue
        turns = fields.as_objects(value, f"'{name}'", entry)
        if not turns:
            continue
        if any(key in turn for turn in turns for key in _ROLES) or not _is_pair(turns[0]):
            return _spoken(turns, has_images)
        pairs = [_pair(turn) for turn in turns]
        if name == "texts":  # the Cauldron's questions have no marks, so `<image>` in them is text
            return _images_first([message for pair in pairs for message in _plain(*pair)], images)
        return _with_marks(pairs, images)
    if fields.first_present(record, (*_INSTRUCTIONS, *_INPUTS, *_QUESTIONS)) is not None:
        return _question_and_answer(record, images)
    if has_images and caption(record) is not None and fields.first_present(record, _ANSWERS) is None:
        answer = text_message("assistant", _alternative(caption(record)))
        content = [text_part(instruction)] if instruction else []
        return _images_first([{"role": "user", "content": content}, answer], images)
    found = ", ".join(sorted(map(str, record))) or "none"
    raise Refusal(
        "unreadable record",
        "'conversations' is missing: the record has neither messages, nor conversations, nor texts, nor a question and "
        f"an answer. Its fields: {found}",
    )


def _question_and_answer(record: Mapping[str, Any], images: Sequence[bytes | str | None]) -> list[Message]:
    """Returns the messages of a record with a question, an answer, and earlier questions and answers."""
    answer = fields.first_present(record, _ANSWERS)
    asked = [fields.first_present(record, names) for names in (_INSTRUCTIONS, _INPUTS)]
    asked = [value for value in asked if value is not None] or [fields.first_present(record, _QUESTIONS)]
    if isinstance(asked[0], list | dict) and len(asked) == 1:  # TRL: prompt and completion are lists of messages
        turns = [
            turn for value in (asked[0], answer or []) for turn in fields.as_objects(value, "'prompt'", "a message")
        ]
        return _spoken(turns, has_images=any(image is not None for image in images))
    pairs = []
    for entry in fields.as_list(record.get("history")):
        if isinstance(entry, dict):
            entry = _pair(entry)
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise Refusal("unreadable record", "an entry of 'history' is not a pair of a question and an answer")
        pairs.append(tuple(entry))
    question = "\n".join(expect_text(value, "the question") for value in asked)
    _refuse_hidden_choices(record, question)
    return _with_marks([*pairs, (question, _alternative(answer))], images)


def _refuse_placeholders(record: Mapping[str, Any]) -> None:
    """Raises a `Refusal` if texts have placeholders that a field fills, as in ms-swift's data for grounding."""
    if fields.is_absent(record.get("objects")):
        return
    texts = json.dumps([record.get(name) for name in (*_DIALOGUES, *_QUESTIONS, *_ANSWERS)], default=str)
    if found := [mark for mark in _PLACEHOLDERS if mark in texts]:
        raise Refusal(
            "unreadable record",
            f"the text has {' and '.join(found)}, to be replaced by what 'objects' holds: replace them in the record",
        )


def _refuse_hidden_choices(record: Mapping[str, Any], question: str) -> None:
    """Raises a `Refusal` if a question does not show the choices that its answer is one of."""
    choices = fields.first_present(record, _CHOICES)
    shown = choices if isinstance(choices, list) else [] if choices is None else [choices]
    if not all(str(choice).lower() in question.lower() for choice in shown):
        raise Refusal(
            "unreadable record",
            "the record has choices that its question does not show: write them into the question, and the answer as "
            "the text or the letter of one of them",
        )


def _alternative(answer: Any) -> Any:
    """Returns the first of several correct answers, and a number as text."""
    answer = answer[0] if isinstance(answer, list) and answer else answer
    return str(answer) if isinstance(answer, int | float) and not isinstance(answer, bool) else answer


def _is_pair(turn: Mapping[str, Any]) -> bool:
    """Returns whether a turn holds a question and its answer."""
    return any(name in turn for name in (*_ASKED, *_ANSWERED))


def _pair(turn: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns a question, which is empty if the images alone are the question, and its answer."""
    return fields.first_present(turn, _ASKED) or "", fields.first_present(turn, _ANSWERED)


def _plain(question: Any, answer: Any) -> list[Message]:
    """Returns a question and its answer as messages, without marks."""
    question, answer = expect_text(question, "the user's text"), expect_text(answer, "the assistant's text")
    return [
        {"role": "user", "content": [text_part(question)] if question else []},
        {"role": "assistant", "content": [text_part(answer)]},
    ]


def _with_marks(pairs: Sequence[tuple[Any, Any]], images: Sequence[bytes | str | None]) -> list[Message]:
    """Returns questions and answers as messages. Images that no mark places come first."""
    messages = []
    for question, answer in pairs:
        has_images = any(image is not None for image in images)
        messages.append({"role": "user", "content": _marked(expect_text(question, "the user's text"), has_images)})
        messages.append({"role": "assistant", "content": [text_part(expect_text(answer, "the assistant's text"))]})
    if not any(_is_image(part) for message in messages for part in message["content"]):
        return _images_first(messages, images)
    return messages


def _images_first(messages: list[Message], images: Sequence[bytes | str | None]) -> list[Message]:
    """Returns the messages with all images before the first question."""
    messages[0]["content"][:0] = [IMAGE] * sum(image is not None for image in images)
    return messages


def _spoken(turns: Sequence[Mapping[str, Any]], has_images: bool) -> list[Message]:
    """Returns the messages of turns that state their role."""
    messages = []
    can_join = False
    for turn in turns:
        spelled = next((turn[name] for name in _ROLES if turn.get(name) is not None), None)
        role = expect_role(spelled)
        if role == "system" and fields.first_present(turn, _CONTENTS) is None:
            continue
        if role == "assistant" and any(name in turn and turn[name] in (False, 0) for name in _WEIGHTS):
            raise Refusal(
                "answers not to learn",
                "an answer is marked as not to be learned (loss, weight or train is 0), but every answer is learned: "
                "leave it out, or make it part of the question",
            )
        message = {"role": role, "content": _content(turn, role, has_images)}
        # The calls and results of tools, and a message that is only an image, continue a message of the same role.
        only_images = bool(message["content"]) and all(_is_image(part) for part in message["content"])
        joins = spelled.strip().lower() in TOOL_ROLES or role == "user" and only_images
        if messages and messages[-1]["role"] == role and (joins or can_join):
            before = messages[-1]["content"]
            are_texts = bool(before) and not _is_image(before[-1]) and not only_images
            messages[-1]["content"] = [*before, *([text_part("\n")] if are_texts else []), *message["content"]]
        else:
            messages.append(message)
        can_join = joins
    return messages


def _content(turn: Mapping[str, Any], role: str, has_images: bool) -> list[dict[str, Any]]:
    """Returns the parts of a turn."""
    value = next((turn[name] for name in _CONTENTS if turn.get(name) is not None), None)
    calls = turn.get("tool_calls")
    if not fields.is_absent(calls):
        named = [call.get("function", call) if isinstance(call, dict) else call for call in fields.as_list(calls)]
        calls = [text_part(json.dumps(named, ensure_ascii=False, default=str))]
        return calls if fields.is_absent(value) else [*_content({"value": value}, role, has_images), *calls]
    if isinstance(value, dict):
        value = fields.as_objects(value, "the content", "a part") if fields.is_struct_of_lists(value) else [value]
    if isinstance(value, list):
        return [_part(part) for part in value if not fields.is_absent(part)]
    if role != "user":
        return text_message(role, value)["content"]
    return _marked(expect_text(value, "a message's text"), has_images)


def _marked(text: str, has_images: bool) -> list[dict[str, Any]]:
    """Returns the parts of a text in which marks stand for images, or named images if the record lists none."""
    if has_images or not _NAMED_IMAGE.search(text):
        return text_message("user", text, IMAGE_MARK)["content"]
    names = [name.strip() for name in _NAMED_IMAGE.findall(text)]
    parts = text_message("user", _NAMED_IMAGE.sub("<img></img>", text), "<img></img>")["content"]
    return [{"type": "image", "source": names.pop(0)} if part == IMAGE else part for part in parts]


def _part(part: Any) -> dict[str, Any]:
    """Returns a part of a message; an image keeps its `source` or its `index`."""
    if isinstance(part, str):
        return text_part(part)
    part = expect_object(part, "a part")
    kind = part.get("type")
    if kind is None:  # Qwen: {"image": "a.png"}, {"text": "What is this?"}
        kind = next(
            (name for name in ("image", "image_url", "video", "audio", "text") if part.get(name) is not None), None
        )
    if kind in ("image", "image_url", "input_image", "image_path", "image_binary"):
        source = fields.first_present(part, ("image", "image_url", "url", "path", "bytes", "content", "source"))
        if source is not None:
            return {"type": "image", "source": source}
        return {"type": "image"} if part.get("index") is None else {"type": "image", "index": part["index"]}
    if kind in ("text", "input_text", "output_text"):
        text = part["content"] if part.get("text") is None and part.get("content") is not None else part.get("text")
        return text_part(expect_text(text, "the text of a part"))
    if kind in ("video", "video_url", "input_video"):
        raise fields.other_media("a video", f"in a part of a message ('{kind}', expected 'text' or 'image')", part)
    if kind in ("audio", "audio_url", "input_audio"):
        raise fields.other_media("audio", f"in a part of a message ('{kind}', expected 'text' or 'image')", part)
    raise Refusal(
        "unreadable record", f"a part of a message has the type {repr(kind)[:60]}, expected 'text' or 'image'"
    )


def _with_system(messages: list[Message], record: Mapping[str, Any]) -> list[Message]:
    """Returns the messages with the record's own system text and its tools, which come first."""
    texts = []
    if not messages or messages[0]["role"] != "system":
        texts.append(fields.first_present(record, _SYSTEMS))
    tools = record.get("tools")
    texts.append(None if fields.is_absent(tools) or tools in ("[]", "{}") else tools)
    texts = [
        text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str)
        for text in texts
        if text is not None
    ]
    if not texts:
        return messages
    if messages and messages[0]["role"] == "system":
        content = [*messages[0]["content"], *(text_part("\n\n" + text) for text in texts)]
        return [{"role": "system", "content": content}, *messages[1:]]
    return [{"role": "system", "content": [text_part("\n\n".join(texts))]}, *messages]


def _is_image(part: Mapping[str, Any]) -> bool:
    """Returns whether a part stands for an image."""
    return part["type"] == "image"


def _place_images(
    messages: Sequence[Message], images: Sequence[bytes | str | None]
) -> tuple[list[Message], list[bytes | str]]:
    """Returns the messages with plain marks, and the images in the order of the marks.

    The image of a mark is its own `source`, or the one with its `index` if all marks have one, or else the next one.
    Images that remain are returned, too, so that `checks.check` refuses the record.
    """
    marks = [part for message in messages for part in message["content"] if _is_image(part)]
    numbers = [mark.get("index") for mark in marks]
    if marks and all(number is not None for number in numbers):
        if any(not isinstance(n, int) or not 0 <= n < len(images) or images[n] is None for n in numbers):
            raise Refusal("image marks", f"the parts refer to the images {numbers[:20]}, but there are {len(images)}")
        ordered = [images[number] for number in numbers]
    else:
        own = [fields.image_source(mark["source"]) if "source" in mark else None for mark in marks]
        remaining = [image for image in images if image is not None]
        if remaining == own:  # the record lists the same images once more
            remaining = []
        ordered = []
        for source in own:
            if source is not None or remaining:
                ordered.append(source if source is not None else remaining.pop(0))
        ordered += remaining
    plain = [
        {"role": message["role"], "content": [IMAGE if _is_image(part) else part for part in message["content"]]}
        for message in messages
    ]
    return plain, ordered
