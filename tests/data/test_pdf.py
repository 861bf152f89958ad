import logging

import numpy as np
import PIL.Image
import pytest

from alignvlm_jax.data import pdf
from alignvlm_jax.data.images import image_size, open_image, open_pages
from alignvlm_jax.data.page_scale import page_scale
from alignvlm_jax.data.tiling import TilingConfig, plan_tiles
from alignvlm_jax.errors import UserError
from tests.data import pdf_files


def colors(*names, size=(40, 60)):
    return [PIL.Image.new("RGB", size, name) for name in names]


def test_a_page_fills_the_tiles_and_shows_its_text():
    page = open_image(pdf_files.with_text("Total"))
    assert page.mode == "RGB" and page.size == (2000, 1000)  # 2 million pixels; at 200 dots per inch, 154,000
    ink = np.argwhere(np.asarray(page.convert("L")) < 128)
    # Baseline at 40 of 100 points, text from 20 points on.
    assert 400 < ink[:, 0].min() < 500 and 590 < ink[:, 0].max() < 610 and 200 < ink[:, 1].min() < 220
    letter = open_image(pdf_files.of_pages([(595, 842)]))
    assert letter.size == (1653, 2339)  # A4 at 200 dots per inch
    assert all(page_scale(plan_tiles(*image.size, TilingConfig())) < 1 for image in (page, letter))


def test_sizes_are_bounded():
    assert np.prod(open_image(pdf_files.of_pages([(14000, 4000)])).size) <= 18_000_000
    assert np.prod(open_image(pdf_files.of_pages([(100, 100)]), max_pixels=10_000).size) <= 10_000
    assert image_size(pdf_files.of_pages([(595, 842)])) == (1653, 2339)


def test_path_with_and_without_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pdf").write_bytes(pdf_files.of_images(*colors("red", "lime", "blue")))
    assert [page.getpixel((9, 9)) for page in open_pages("a.pdf")] == [(254, 0, 0), (0, 255, 1), (0, 0, 254)]
    for source in ("a.pdf#page=3", tmp_path / "a.pdf#page=3"):
        assert open_image(source).getpixel((9, 9)) == (0, 0, 254)
        assert len(open_pages(source)) == 1
    with pytest.raises(UserError, match=r"^a.pdf: a PDF of 3 pages where one image is expected. Name a page: a.pdf#p"):
        open_image("a.pdf")
    with pytest.raises(UserError, match=r"^a.pdf: has 3 pages, so there is no page 4. Name one from 1 to 3$"):
        open_image("a.pdf#page=4")
    for number in ("0", "-1", "two", ""):
        with pytest.raises(UserError, match="expected the number of a page, from 1, after #page="):
            open_image(f"a.pdf#page={number}")
    # A file may have such a name.
    colors("white")[0].save("b#page=2", "PNG")
    assert open_image("b#page=2").size == (40, 60)
    colors("white")[0].save("c.png")
    with pytest.raises(UserError, match=r"^c.png: not a PDF, so it has no page 2. Leave out #page=2$"):
        open_image("c.png#page=2")


def test_the_limit_on_pages_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        pages = open_pages(pdf_files.of_pages([(50, 50)] * 5), name="a.pdf", max_pages=2)
    assert len(pages) == 2
    expected = "a.pdf has 5 pages: only the first 2 are read. Name another one with a.pdf#page=3"
    assert caplog.messages == [expected]


@pytest.mark.parametrize(
    "data, why",
    [
        (pdf_files.encrypted(), "a PDF with a password. Remove it with `qpdf --decrypt"),
        (pdf_files.with_text("a")[:120], "a PDF that is damaged or has no pages. Copy or download it again"),
        (b"%PDF-1.7\nhello", "damaged"),
        (pdf_files.of_pages([]), "has no pages"),
        (pdf_files.of_pages([(20_000, 20_000)]), "page 1: the page is 277.8 x 277.8 inches, which is too large"),
        (pdf_files.of_pages([(1000, 1)]), "too narrow. Crop or split it"),
        (
            pdf_files.with_large_image(50_000),
            "an image of 50000 x 50000 pixels, more than the limit of 80000000. Shrink",
        ),
        (pdf_files.nested_bomb(), "unpacks to more than 400 MB"),
    ],
)
def test_refused_files_say_what_to_do(data, why):
    with pytest.raises(UserError, match=f"^a.pdf.*{why}") as error:
        open_image(data, name="a.pdf")
    assert "\n" not in str(error.value)


def test_a_stream_is_not_unpacked_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(pdf, "_MAX_STREAM", 2_000_000)
    with pytest.raises(UserError, match="unpacks to more than 2 MB, which no page needs"):
        open_image(pdf_files.bomb(3_000_000))
    open_image(pdf_files.bomb(1_000_000), max_pixels=100)


def test_damaged_files_raise_no_other_error():
    rng, data = np.random.default_rng(0), pdf_files.of_images(*colors("red", size=(8, 8)))
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(8, len(data), 6):
            damaged[place] = rng.integers(256)
        try:
            outcomes.add(type(open_image(bytes(damaged), max_pixels=10_000)))
        except UserError:
            outcomes.add(UserError)
    assert outcomes == {PIL.Image.Image, UserError}
