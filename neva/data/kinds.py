"""What a file is that is no image for us, seen from how it begins; and PNG images without what no
pixel depends on."""

import struct
from pathlib import Path

from neva.data.sample import Picture

LOOKED_AT = 1024
"""Bytes at the front of a file that say what it is."""
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
SAVE = "save it as JPEG or PNG"
STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"%PDF-", "a PDF document", "save its pages as PNG (pdftoppm -png)"),
    (b"%!PS", "a PostScript program", SAVE),
    (b"\xc5\xd0\xd3\xc6", "a PostScript program", SAVE),
    (b"8BPS", "a Photoshop document", SAVE),
    (b"gimp xcf", "a GIMP document", SAVE),
    (b"\xff\x0a", "a JPEG XL image", SAVE),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image", SAVE),
    (b"\x1f\x8b", "compressed by gzip", "unpack it"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"\x1a\x45\xdf\xa3", "a video", "take a frame of it"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file: git lfs pull"),
)
"""How files begin, what they are, and what to do."""
PAGE = "a web page, perhaps that of a failed download"
MARKUP: tuple[tuple[bytes, str, str], ...] = (
    (b"<svg", "an SVG drawing", "draw it as PNG (rsvg-convert)"),
    (b"<html", PAGE, "download the image again"),
    (b"<!doctype html", PAGE, "download the image again"),
)
"""Words of markup near the front."""


def what_it_is(start: bytes) -> tuple[str, str] | None:
    """What a file is that begins so, and what to do; None where it is not known."""
    if start[4:8] == b"ftyp":
        brand = start[8:12]
        if brand in HEIC:
            return "a HEIC image", f"{SAVE} (heif-convert, or a phone's 'most compatible' setting)"
        if brand in (b"avif", b"avis"):
            return "an AVIF image, which this Pillow was built without", SAVE
        return "a video", "take a frame of it"
    for signature, what, fix in STARTS:
        if start.startswith(signature):
            return what, fix
    lower = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if lower.startswith(b"<"):
        return next(((what, fix) for word, what, fix in MARKUP if word in lower), None)
    return None


def first_bytes(picture: Picture) -> bytes:
    """The front of a picture's file; empty if there is none."""
    if isinstance(picture, bytes):
        return picture[:LOOKED_AT]
    if not isinstance(picture, Path) or not picture.is_file():
        return b""
    with picture.open("rb") as file:
        return file.read(LOOKED_AT)


PNG = b"\x89PNG\r\n\x1a\n"
UNUSED = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Chunks of text, and of a colour profile, on which no pixel depends. Pillow refuses an image for
one that unpacks to over a megabyte."""


def without_text(picture: Picture) -> bytes | None:
    """A PNG without such chunks; None for one that has none, and for what is no PNG."""
    if not first_bytes(picture).startswith(PNG):
        return None
    content = picture.read_bytes() if isinstance(picture, Path) else picture
    assert isinstance(content, bytes)
    kept = [PNG]
    place = len(PNG)
    while place < len(content):
        length = 12
        if place + 4 <= len(content):
            length += struct.unpack_from(">I", content, place)[0]
        if content[place + 4 : place + 8] not in UNUSED:
            kept.append(content[place : place + length])
        place += length
    bare = b"".join(kept)
    return bare if len(bare) < len(content) else None
