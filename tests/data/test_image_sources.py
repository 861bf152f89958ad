import base64
import http.server
import io
import pathlib
import threading

import numpy as np
import PIL.Image
import pytest

from alignvlm_jax.data import image_sources
from alignvlm_jax.data.image_sources import open_images, open_single_image
from alignvlm_jax.errors import TemporaryError, UserError
from tests.data import pdf_files

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)


def png(pixels=PIXELS):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def test_every_form_of_one_image(tmp_path):
    path = tmp_path / "page.png"
    path.write_bytes(png())
    forms = [str(path), path, png(), bytearray(png()), PIL.Image.fromarray(PIXELS), PIXELS, data_url(png())]
    for form in forms:
        (image,) = open_images(form)
        np.testing.assert_array_equal(np.asarray(image), PIXELS)
        np.testing.assert_array_equal(np.asarray(open_single_image(form)), PIXELS)


def test_arrays():
    gray = PIXELS[..., 0]
    for array in (gray, gray[..., None], np.repeat(gray[..., None], 3, -1)):
        np.testing.assert_array_equal(np.asarray(open_single_image(array))[..., 0], gray)
    assert open_single_image(np.eye(2, dtype=bool)).getpixel((0, 1)) == (0, 0, 0)
    # Transparent is white.
    assert open_single_image(np.zeros((2, 2, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)
    for array, why in [
        (PIXELS / 255, "an array of type float64 does not tell which value is white"),
        (np.zeros((3, 5, 5), np.uint8), r"an array of shape \[3, 5, 5\] is not an image"),
        (np.zeros((0, 5), np.uint8), "is not an image"),
        (np.zeros(5, np.uint8), "is not an image"),
    ]:
        with pytest.raises(UserError, match=why):
            open_images(array)


def test_a_pdf_gives_its_pages():
    data = pdf_files.of_pages([(50, 50)] * 3)
    assert [len(open_images(form)) for form in (data, data_url(data, "application/pdf"))] == [3, 3]
    assert len(open_images(data, max_pages=2)) == 2
    with pytest.raises(UserError, match="a PDF of 3 pages where one image is expected"):
        open_single_image(data)


@pytest.mark.parametrize(
    "source, why",
    [
        (7, "an image of type int cannot be opened. Give a path, bytes, a PIL image, a numpy array or a data URL"),
        (None, "type NoneType"),
        ("data:image/png;base64,@@@", "cannot be decoded"),
        ("data:audio/wav;base64,AAAA", "audio"),
        (data_url(b"hello"), "the image in the data URL: not an image in a format that can be read"),
        ("https://example.org/page.png", "a link, not a file. Download it"),
        (pathlib.Path("nowhere.png"), "no such image file"),
    ],
)
def test_refused_sources(source, why):
    with pytest.raises(UserError, match=why):
        open_images(source)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/page.png")
            self.end_headers()
            return
        self.send_response(200 if self.path == "/page.png" else 404)
        self.end_headers()
        self.wfile.write(png() if self.path == "/page.png" else b"")

    def log_message(self, *args):
        pass


def test_urls_are_fetched_only_if_allowed(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for path in ("/page.png", "/moved"):
            np.testing.assert_array_equal(np.asarray(open_images(url + path, allow_urls=True)[0]), PIXELS)
        with pytest.raises(UserError, match="the server answers 404 Not Found"):
            open_images(f"{url}/other", allow_urls=True)
        with pytest.raises(UserError, match="a link, not a file"):
            open_images(f"{url}/page.png")
        monkeypatch.setattr(image_sources, "MAX_DOWNLOAD", 10)
        with pytest.raises(UserError, match="more than 0 MiB"):
            open_images(f"{url}/page.png", allow_urls=True)
        server.shutdown()
    with pytest.raises(TemporaryError, match="cannot be fetched"):
        open_images(f"{url}/page.png", allow_urls=True)
