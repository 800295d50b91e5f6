"""The headers of picture files, read by hand before a decoder sees the file.

A decoder trusts its file: it allocates what a header says, inflates every text, walks every directory. Here limits
are checked first, and what has nothing to do with pixels is left out of what the decoder gets.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import replace

from server.errors import FormatUnsupported, ImageEmpty, ImageError, ImageTruncated
from server.headers.bmp import read_bmp
from server.headers.header import UPRIGHT, Format, Header
from server.headers.jpeg import read_jpeg
from server.headers.png import read_png
from server.headers.tiff import read_tiff
from server.headers.webp import read_webp

__all__ = ["BEGINNING_BYTES", "FORMAT_NAMES", "Format", "Header", "format_of", "read_header", "refusal"]

FORMAT_NAMES = "JPEG, PNG, WebP, BMP or TIFF"

BEGINNING_BYTES = 1024
"""So much of a file tells what it is."""

_SIGNATURES: tuple[tuple[Format, re.Pattern[bytes]], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("WEBP", re.compile(rb"RIFF.{4}WEBP", re.DOTALL)),
    ("BMP", re.compile(rb"BM")),
    ("TIFF", re.compile(rb"II[*+]\x00|MM\x00[*+]")),
)

_READERS: dict[Format, Callable[[bytes, int], Header]] = {
    "JPEG": read_jpeg,
    "PNG": read_png,
    "WEBP": read_webp,
    "BMP": read_bmp,
    "TIFF": read_tiff,
}

# Files that people do send, to be called by their name; everything else is just not a picture.
_KNOWN_OTHERS = (
    (re.compile(rb"GIF8"), "GIF"),
    (re.compile(rb".{4}ftyp(heic|heix|mif1|hevc)", re.DOTALL), "HEIC"),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "AVIF"),
    (re.compile(rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"), "JPEG 2000"),
    (re.compile(rb"\x00\x00\x01\x00"), "ICO"),
    (re.compile(rb"8BPS"), "PSD"),
    (re.compile(rb"%PDF"), "PDF"),
    (re.compile(rb"\s*<(?:[^\x00]*<)?svg"), "SVG"),
)


def format_of(data: bytes) -> Format | None:
    """The format that a file's first bytes are of, if it is one that is served."""
    return next((name for name, signature in _SIGNATURES if signature.match(data)), None)


def read_header(data: bytes, max_image_pixels: int) -> Header:
    """What `data` says of its picture. Raises ImageError, or one of its kinds, if it must not be decoded."""
    if not data:
        raise ImageEmpty("no bytes where an image should be")
    file_format = format_of(data)
    if file_format is None:
        raise refusal(data[:BEGINNING_BYTES], len(data), blank=not data.strip(b"\0"))
    try:
        header = _READERS[file_format](data, max_image_pixels)
    except (struct.error, IndexError) as error:
        raise ImageTruncated(f"the {file_format} file ends before its picture does") from error
    if min(header.width, header.height) < 1:
        raise ImageError(f"{header.width}x{header.height}: a picture without pixels")
    if header.orientation == UPRIGHT:
        return header
    turned_bytes = 4 * header.width * header.height  # beside the picture as it is stored
    return replace(header, peak_bytes=header.peak_bytes + turned_bytes)


def refusal(beginning: bytes, size: int, *, blank: bool) -> ImageError:
    """What is said of a file of no format that is served: `size` bytes, all of them zero if `blank`."""
    for signature, name in _KNOWN_OTHERS:
        if signature.match(beginning):
            return FormatUnsupported(f"{name} is not supported; send {FORMAT_NAMES}")
    found = f"{size} zero bytes" if blank else f"it begins with {beginning[:8]!r}"
    return ImageError(f"not a picture in {FORMAT_NAMES}: {found}")
