"""Names the kinds of files that are not readable images, with the next step for each.

A copy of this file is part of every exported PyTorch model (`interop/pytorch`), so it imports only the
standard library.
"""

import struct


class UnreadableImageError(ValueError):
    """An intact file that is not read, because it is no image or an unusual one.

    Attributes:
      what: what the file is, or what is unusual about it.
      next_step: sentence that tells what to do.
    """

    def __init__(self, what: str, next_step: str):
        super().__init__(f"{what}. {next_step}" if next_step else what)
        self.what, self.next_step = what, next_step


def convert_with(command: str) -> str:
    """Returns the sentence that recommends a command."""
    return f"Convert it with `{command}`."


_MAGICK = convert_with("magick FILE page.png")
_RAW = ("a raw photo of a camera ({})", convert_with("magick FILE page.png` or `dcraw_emu -T FILE"))
_VIDEO = ("a video ({})", "Extract the frames with `ffmpeg -i FILE frame%04d.png`.")
_AUDIO = ("a sound file ({})", "Remove the record, or give the path of its image.")
_ARCHIVE = ("an archive ({})", "Unpack it with `{}`, and give the paths of the images inside.")
_DATA = ("a file of {}", "Give the path of an image file.")
_HEIC_STEP = (
    "Convert it with `magick FILE page.png` or `heif-convert FILE page.png`, or install its reader with "
    "`pip install pillow-heif`."
)
_AVIF_STEP = "Convert it with `magick FILE page.png`, or install a reader with `pip install 'pillow>=11.3'`."
_JXL_STEP = "Convert it with `djxl FILE page.png` or `magick FILE page.png`."


def _filled(kind: tuple[str, str], *values: str) -> tuple[str, str]:
    """Returns the description and the next step of a kind with their placeholders filled in."""
    what, next_step = kind
    return what.format(values[0]), next_step.format(*values[1:])


# The first bytes of formats that are readable, whose files need no closer check.
_READABLE = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM")

# First bytes, what the file is, and the next step.
_BY_PREFIX: tuple[tuple[bytes, tuple[str, str]], ...] = (
    (b"%!PS", ("a PostScript or EPS file", convert_with("gs -sDEVICE=png16m -r200 -o page%d.png FILE"))),
    (b"\xc5\xd0\xd3\xc6", ("a PostScript or EPS file", convert_with("gs -sDEVICE=png16m -r200 -o page%d.png FILE"))),
    (b"8BPS", ("a Photoshop file (PSD)", convert_with("magick 'FILE[0]' page.png"))),
    (b"gimp xcf", ("a GIMP file (XCF)", convert_with("magick FILE -flatten page.png"))),
    (b"\xff\x0a", ("a JPEG XL image", _JXL_STEP)),
    (b"\0\0\0\x0cJXL \r\n\x87\n", ("a JPEG XL image", _JXL_STEP)),
    (b"II\xbc", ("a JPEG XR image", convert_with("JxrDecApp -i FILE -o page.tif"))),
    (b"BPG\xfb", ("a BPG image", convert_with("bpgdec -o page.png FILE"))),
    (b"AT&TFORM", ("a DjVu document", convert_with("ddjvu -format=tiff FILE pages.tif"))),
    (b"\x97JB2\r\n\x1a\n", ("a JBIG2 image", convert_with("jbig2dec -o page.png FILE"))),
    (b"\x8aMNG", ("an MNG animation", _MAGICK)),
    (b"\x8bJNG", ("a JNG image", _MAGICK)),
    (b"icns", ("an icon file of macOS (ICNS)", _MAGICK)),
    (b"DDS ", ("a texture (DDS)", _MAGICK)),
    (b"v/1\x01", ("an OpenEXR image", _MAGICK)),
    (b"#?RADIANCE", ("a Radiance HDR image", _MAGICK)),
    (b"#?RGBE", ("a Radiance HDR image", _MAGICK)),
    (b"SIMPLE  =", ("a FITS image", _MAGICK)),
    (b"\xd7\xcd\xc6\x9a", ("a Windows metafile (WMF)", convert_with("soffice --headless --convert-to png FILE"))),
    # Raw photos that are not TIFF files, or that Pillow takes for one.
    (b"FUJIFILMCCD-RAW", _filled(_RAW, "RAF")),
    (b"IIRO", _filled(_RAW, "ORF")),
    (b"IIRS", _filled(_RAW, "ORF")),
    (b"MMOR", _filled(_RAW, "ORF")),
    (b"IIU\0", _filled(_RAW, "RW2")),
    (b"FOVb", _filled(_RAW, "X3F")),
    (b"\0MRM", _filled(_RAW, "MRW")),
    # Video and sound.
    (b"\x1aE\xdf\xa3", _filled(_VIDEO, "Matroska or WebM")),
    (b"FLV\1", _filled(_VIDEO, "FLV")),
    (b"\0\0\1\xba", _filled(_VIDEO, "MPEG")),
    (b"\0\0\1\xb3", _filled(_VIDEO, "MPEG")),
    (b"0&\xb2u\x8ef\xcf\x11", _filled(_VIDEO, "WMV")),
    (b"OggS", _filled(_AUDIO, "Ogg")),
    (b"ID3", _filled(_AUDIO, "MP3")),
    (b"fLaC", _filled(_AUDIO, "FLAC")),
    # Archives and data.
    (b"\x1f\x8b", _filled(_ARCHIVE, "gzip", "gunzip FILE")),
    (b"BZh", _filled(_ARCHIVE, "bzip2", "bunzip2 FILE")),
    (b"\xfd7zXZ\0", _filled(_ARCHIVE, "xz", "unxz FILE")),
    (b"(\xb5/\xfd", _filled(_ARCHIVE, "zstandard", "unzstd FILE")),
    (b"7z\xbc\xaf\x27\x1c", _filled(_ARCHIVE, "7z", "7z x FILE")),
    (b"Rar!", _filled(_ARCHIVE, "RAR", "unrar x FILE")),
    (
        b"\xd0\xcf\x11\xe0",
        ("an old Office document or Thumbs.db", convert_with("soffice --headless --convert-to pdf FILE")),
    ),
    (b"PAR1", _filled(_DATA, "Parquet")),
    (b"\x93NUMPY", _filled(_DATA, "NumPy")),
    (b"SQLite format 3", _filled(_DATA, "SQLite")),
    (b"{\\rtf", ("an RTF document", convert_with("soffice --headless --convert-to pdf FILE"))),
    # Stand-ins for a file.
    (
        b"version https://git-lfs.github.com/spec/",
        ("a Git LFS pointer, not the file itself", "Fetch it with `git lfs pull`."),
    ),
    (b"[InternetShortcut]", ("a link (Windows .url file)", "Download what it points to.")),
    (b"L\0\0\0\1\x14\2\0", ("a link (Windows .lnk file)", "Give the path of the file that it points to.")),
    (b"\0\5\x16\7", ("a companion file of macOS (._NAME)", "Remove it; the image is the file without `._`.")),
    (b"\0\5\x16\0", ("a companion file of macOS (AppleSingle)", "Give the path of the image itself.")),
    (b"\x89PNG", ("a PNG damaged by a transfer in text mode", "Transfer it again, as binary.")),
    (b"<?php", ("a PHP script", "Download the image again.")),
)

# Brands of ISO media files: the four bytes after "ftyp".
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"heif"}
_AVIF_BRANDS = {b"avif", b"avis"}

# The start of the base64 text of common image formats.
_BASE64 = (b"iVBORw0KGgo", b"/9j/", b"R0lGOD", b"UklGR", b"SUkqA", b"TU0AK", b"JVBERi0")

_JPEG_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")

# Members by which office documents and other formats that are zip archives are known.
_OFFICE = (b"word/", b"xl/", b"ppt/", b"[Content_Types].xml", b"mimetypeapplication/vnd.oasis")

_JPEG_FRAMES = {0xC3: "lossless", 0xC7: "lossless", 0xCB: "lossless", 0xCF: "lossless", 0xF7: "JPEG-LS"}


def is_heif(data: bytes) -> bool:
    """Returns whether a file is a HEIC or HEIF image."""
    return data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and not is_avif(data)


def is_avif(data: bytes) -> bool:
    """Returns whether a file is an AVIF image."""
    # The general brand mif1 is followed by the brands that the file is compatible with.
    return data[4:8] == b"ftyp" and (
        data[8:12] in _AVIF_BRANDS or (data[8:12] in (b"mif1", b"msf1") and b"avif" in data[16:64])
    )


def is_jxl(data: bytes) -> bool:
    """Returns whether a file is a JPEG XL image."""
    return data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"))


def is_office(data: bytes) -> bool:
    """Returns whether a zip archive is an office document."""
    return any(member in data[:4096] for member in _OFFICE)


def identify(data: bytes) -> tuple[str, str] | None:
    """Returns what a file is and the next step, or None if it is an image or unknown."""
    if data.startswith(b"\x89PNG") and data[12:16] == b"CgBI":
        command = "pngcrush -revert-iphone-optimizations FILE page.png"
        return "a PNG in the format of iOS apps (CgBI)", convert_with(command)
    if data.startswith(_READABLE):
        return None
    for prefix, kind in _BY_PREFIX:
        if data.startswith(prefix):
            return kind
    return _identify_container(data) or _identify_text(data)


def identify_undecodable(data: bytes) -> tuple[str, str] | None:
    """Returns what is unusual about a file that looks like an image but cannot be decoded, or None."""
    if data.startswith(b"\xff\xd8"):
        return _identify_jpeg(data)
    if data and not data.strip(b"\0"):
        return f"{len(data)} zero bytes, a file that was never written", "Copy or download it again."
    return None


def identify_path(path: str) -> tuple[str, str] | None:
    """Returns what a text is that is no path of a file, and the next step, or None if it may be a path."""
    start = path[:200].lstrip().lower()
    if start.startswith("data:"):
        return "a data URL, not a file", "Decode the base64 text after its comma, and pass the bytes."
    if "://" in start[:12] and not start.startswith(("file:", "gs:", "s3:")):
        return "a link, not a file", "Download it, and give the path of the copy."
    if path.encode("utf-8", "replace").startswith(_BASE64) and len(path) > 100:
        return "the base64 text of an image, not a path", "Decode it, and pass the bytes."
    return None


def _identify_container(data: bytes) -> tuple[str, str] | None:
    """Identifies files by bytes after the first ones."""
    if data[4:8] == b"ftyp":
        if is_avif(data):
            return "an AVIF image", _AVIF_STEP
        if is_heif(data):
            return "a HEIC (HEIF) photo, which phones take", _HEIC_STEP
        if data[8:11] == b"crx":
            return _filled(_RAW, "CR3")
        brand = data[8:12].decode("latin-1").strip()
        return _filled(_VIDEO, f"MP4 or QuickTime, {brand!r}")
    if data[4:8] in (b"moov", b"mdat") and data[:1] == b"\0":
        return _filled(_VIDEO, "QuickTime")
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return _filled(_VIDEO, "AVI")
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return _filled(_AUDIO, "WAV")
    if b"%PDF-" in data[:1024]:
        return "a PDF", "Convert its pages with `pdftoppm -r 200 -png FILE page`."
    if data[:2] == b"PK" and data[2:4] in (b"\3\4", b"\5\6"):
        if is_office(data):
            return "an office document", convert_with("soffice --headless --convert-to pdf FILE")
        return _filled(_ARCHIVE, "zip", "unzip FILE")
    if data[257:262] == b"ustar":
        return _filled(_ARCHIVE, "tar", "tar -xf FILE")
    if data.startswith(_JPEG_2000):
        return _identify_jpeg_2000(data)
    if data[128:132] == b"DICM":
        return "a medical image (DICOM)", convert_with("dcm2img FILE page.png")
    if data[:4] == b"\0\0\2\0" and data[4:5] != b"\0" and data[5:6] == b"\0":
        return "a mouse cursor (CUR)", _MAGICK
    if data[:4] in (b"II*\0", b"MM\0*") and data[8:10] == b"CR":
        return _filled(_RAW, "CR2")
    return None


def _identify_jpeg_2000(data: bytes) -> tuple[str, str] | None:
    """Identifies colors of more than 8 bits, whose white is black in Pillow: 1023 / 4 is rounded to 256, which is 0."""
    start = data.find(b"\xff\x4f\xff\x51")  # start of the codestream and marker SIZ
    if start < 0 or len(data) < start + 42:
        return None
    (number,) = struct.unpack_from(">H", data, start + 40)
    bits = [(size & 0x7F) + 1 for size in data[start + 42 : start + 42 + 3 * number : 3]]
    if number < 2 or not bits or max(bits) <= 8:
        return None
    return f"a JPEG 2000 image of {number} x {max(bits)} bits per pixel", convert_with("magick FILE -depth 8 page.png")


def _identify_text(data: bytes) -> tuple[str, str] | None:
    """Identifies text: pages, drawings, links, and images written as text."""
    head = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
    lower = head.lower()
    if b"\0" in head:
        return None
    if b"<svg" in lower:
        return "an SVG drawing", convert_with("rsvg-convert -o page.png FILE` or `magick FILE page.png")
    if lower.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or (
        lower.startswith(b"<") and b"<html" in lower
    ):
        return (
            "an HTML page, such as a site sends instead of a file",
            "Download the image again, logged in if the site asks for it.",
        )
    if lower.startswith(b"data:"):
        return "a data URL", "Decode the base64 text after its comma, and save the bytes."
    if lower.startswith((b"http://", b"https://", b"s3://", b"gs://", b"hf://")):
        return f"a link ({head[:80].split()[0].decode('latin-1')})", "Download what it points to."
    if head.startswith(_BASE64):
        return "the base64 text of a file", "Decode it with `base64 -d FILE`."
    if b"/annex/objects/" in head[:200]:
        return "a git-annex pointer, not the file itself", "Fetch it with `git annex get FILE`."
    if lower.startswith(b"<?xml"):
        return "an XML file, such as storage sends for an error", "Download the image again."
    if head.startswith((b'{"', b"{\n", b"[{")):
        return "a JSON file, such as a server sends for an error", "Download the image again."
    return None


def _identify_jpeg(data: bytes) -> tuple[str, str] | None:
    """Names what few decoders read: JPEG files of more than 8 bits, without loss, or of other kinds."""
    position = 2
    while position + 5 <= len(data) and data[position] == 0xFF:
        marker, length = struct.unpack_from(">BH", data, position + 1)
        if marker in _JPEG_FRAMES:
            return f"a JPEG of a rare kind ({_JPEG_FRAMES[marker]})", _MAGICK
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits = data[position + 4]
            return (f"a JPEG of {bits} bits per sample", _MAGICK) if bits != 8 else None
        position += 2 + length
    return None
