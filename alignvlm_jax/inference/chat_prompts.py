"""Makes the prompt of a conversation whose messages hold their images (`chat_messages.py`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from alignvlm_jax.data.image_sources import ImageSource, open_images
from alignvlm_jax.inference.chat_messages import read_messages
from alignvlm_jax.inference.prompts import Prompt, PromptMaker


def conversation_prompt(
    maker: PromptMaker,
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[ImageSource] = (),
    *,
    allow_urls: bool = False,
) -> Prompt:
    """Returns the prompt for the model's next turn. The place of a PDF is that of all its pages.

    Args:
      maker: maker of the prompt.
      messages: see `chat_messages.read_messages`.
      images: see `chat_messages.read_messages`.
      allow_urls: whether images are fetched from http(s) URLs.
    """
    chat = read_messages(messages, images)
    cut_images = [[maker.cut(page) for page in open_images(image, allow_urls=allow_urls)] for image in chat.images]
    page_counts = iter(map(len, cut_images))
    expanded = []
    for message in chat.messages:
        content = message["content"]
        if not isinstance(content, str):
            repeats = ([part] * (next(page_counts) if part["type"] == "image" else 1) for part in content)
            content = [part for parts in repeats for part in parts]
        expanded.append({"role": message["role"], "content": content})
    return maker.chat_prompt(expanded, [page for pages in cut_images for page in pages])
