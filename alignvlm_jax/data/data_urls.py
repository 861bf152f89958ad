"""Decodes images that are text: data URLs and base64."""

import base64
import binascii
import re
import urllib.parse

from alignvlm_jax.data.refusal import Refusal

_DATA_URL = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),", re.IGNORECASE)


def decode_data_url(text: str) -> bytes:
    """Returns the content of a data URL.

    Raises:
      Refusal: if it cannot be decoded, or is not of an image.
    """
    header = _DATA_URL.match(text)
    if header is None:
        raise Refusal("image path", f"the image is a data URL without a comma before its content: {text[:60]!r}")
    media_type = header[1].lower()
    if media_type.startswith(("video/", "audio/")):
        kind = "a video" if media_type.startswith("video/") else "audio"
        raise Refusal(
            "unreadable record", f"the image is {kind} as a data URL ({media_type[:120]}); only images are supported"
        )
    content = text[header.end() :]
    if ";base64" not in header[2].lower():
        return urllib.parse.unquote_to_bytes(content)
    return decode_base64(urllib.parse.unquote(content), f"a data URL ({media_type or 'no type'})")


def decode_base64(text: str, what: str) -> bytes:
    """Returns the bytes of base64 text of either alphabet, with or without padding and line breaks.

    Args:
      text: the text.
      what: name of the text in the error message.

    Raises:
      Refusal: if it cannot be decoded.
    """
    text = re.sub(r"\s+", "", text).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal("unreadable image", f"the image is {what} that cannot be decoded ({error})") from error
