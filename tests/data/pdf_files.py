"""Makes PDF files of a few objects, well-formed or broken, without another program."""

import io
import zlib
from collections.abc import Sequence

import PIL.Image


def of_images(*images: PIL.Image.Image, **options) -> bytes:
    """Returns a PDF with one page per image, of one point per pixel."""
    file = io.BytesIO()
    images[0].save(file, "PDF", save_all=True, append_images=images[1:], **options)
    return file.getvalue()


def of_pages(sizes: Sequence[tuple[float, float]], content: bytes = b"", entries: bytes = b"", trailer: bytes = b""):
    """Returns a PDF with pages of these sizes in points, which share one content stream."""
    kids = b" ".join(b"%d 0 R" % (4 + i) for i in range(len(sizes)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(sizes)),
        b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(content), entries, content),
    ]
    for width, height in sizes:
        box = b"[0 0 %g %g]" % (width, height)
        font = b"/Font << /F << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >>"
        entries = b"/Parent 2 0 R /MediaBox %s /Contents 3 0 R /Resources << %s >>" % (box, font)
        objects.append(b"<< /Type /Page %s >>" % entries)
    data, offsets = bytearray(b"%PDF-1.7\n"), []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(data)
    data += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    data += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    data += b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, start)
    return bytes(data)


def with_text(text: str, size: tuple[float, float] = (200, 100)) -> bytes:
    """Returns a PDF of one page with a line of text."""
    return of_pages([size], b"BT /F 24 Tf 20 40 Td (%s) Tj ET" % text.encode())


def encrypted() -> bytes:
    """Returns a PDF that needs a password."""
    security = b"/Encrypt << /Filter /Standard /V 1 /R 2 /O <%s> /U <%s> /P -4 >> /ID [<00> <00>]"
    return of_pages([(100, 100)], trailer=security % (b"11" * 32, b"22" * 32))


def bomb(size: int = 500_000_000) -> bytes:
    """Returns a PDF with a content stream that unpacks to `size` bytes."""
    packer = zlib.compressobj(9)
    block = b" " * 1_000_000
    packed = b"".join(packer.compress(block) for _ in range(size // len(block))) + packer.flush()
    return of_pages([(100, 100)], packed, b"/Filter /FlateDecode")


def nested_bomb() -> bytes:
    """Returns a PDF with a stream that is compressed twice."""
    packed = zlib.compress(zlib.compress(b" " * 10**6))
    return of_pages([(100, 100)], packed, b"/Filter [/FlateDecode /FlateDecode]")


def with_large_image(side: int) -> bytes:
    """Returns a PDF whose page draws an image of side x side pixels, a few bytes of the file."""
    inline = b"q 100 0 0 100 0 0 cm BI /W %d /H %d /BPC 1 /CS /G /F /Fl ID " % (side, side)
    return of_pages([(100, 100)], inline + zlib.compress(b"\0" * 100) + b"\nEI Q")
