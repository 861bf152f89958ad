"""The HTML file loads nothing from elsewhere, and text of pages or users cannot break out of its element."""

import json
import os
import re

import numpy as np
import PIL.Image
import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.inspector import page

MALICIOUS = '</script><script>alert("1")</script><!-- {{data}} {{script}} & \u2028'


def embedded_data(text: str) -> dict:
    """Returns the data embedded in a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL).group(1))


def test_malicious_text_is_embedded_unchanged_and_harmless():
    data = {"name": MALICIOUS, "text": {"words": ["<b>", "é", "\u2581日本", '"']}}
    text = page.render(data, title=MALICIOUS)
    assert embedded_data(text) == data
    assert "<script>alert" not in text and text.count("<script") == 2
    assert "{{title}}" not in text and "&lt;script&gt;alert(&quot;1&quot;)" in text


def test_the_page_references_nothing_elsewhere():
    text = page.render({}, title="")
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|@import|url\(|<link(?! rel=\"icon\" href=\"data:,\")|\bsrc=", text)


@pytest.mark.parametrize("size, kind", [((80, 127), "png"), ((1200, 900), "jpeg"), ((4000, 500), "jpeg")])
def test_images_are_embedded_below_2_mb(size, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    url = page.image_url(PIL.Image.fromarray(pixels))
    assert url.startswith(f"data:image/{kind};base64,") and len(url) < 2e6


def test_files_are_written_without_leftovers(tmp_path):
    page.write("new", tmp_path / "deep" / "page.html")
    assert (tmp_path / "deep" / "page.html").read_text() == "new"
    assert os.listdir(tmp_path / "deep") == ["page.html"]
    with pytest.raises(UserError, match="cannot be written"):
        page.write("new", tmp_path / "deep" / "page.html" / "page.html")
