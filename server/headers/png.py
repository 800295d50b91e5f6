"""PNG: a signature, then chunks of length, kind, content and checksum."""

import struct
import zlib
from collections.abc import Sequence

from server.errors import ImageAnimated, ImageError, ImageTruncated
from server.headers.exif import read_orientation
from server.headers.header import UPRIGHT, Header, check_excess, check_size

_SIGNATURE_BYTES = 8
_AROUND_BYTES = 12  # a chunk's length, kind and checksum
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type

_MOST_CHUNKS = 20_000
"""A file of 24 MB whose writer cuts pixels every 8 KB has 3,000. Each costs the interpreter time."""

_MOST_OTHER_CHUNKS = 1000
"""Beside those that make pixels; files have some ten."""

_MOST_INFLATION = 1040
"""zlib makes at most 1032 bytes of one."""

_MOST_TEXT_BYTES = 16 << 20
"""Of all texts and the profile, inflated. Nothing reads them here, but whoever stores the file may."""

_MOST_DEFLATED_BYTES = 4 << 20
"""Of them as they are in the file; profiles have a megabyte or two. Made for it, 30 MB take seconds to inflate."""


def read_png(data: bytes, max_image_pixels: int) -> Header:
    """The header, and of the file only what makes pixels. Refuses animations, and files that cannot have all pixels."""
    view = memoryview(data)
    kept = [view[:_SIGNATURE_BYTES]]
    orientation, pixel_bytes, chunks = UPRIGHT, 0, 0
    texts: list[memoryview] = []  # deflated
    seen: set[bytes] = set()
    width = height = 0
    bits = color = interlaced = 0
    position = _SIGNATURE_BYTES
    while b"IEND" not in seen:
        length, kind = struct.unpack_from(">I4s", data, position)
        content, position = position + 8, position + _AROUND_BYTES + length
        if position > len(data):
            raise ImageTruncated(f"the PNG file ends within a chunk {kind!r} of {length} bytes")
        chunks += 1
        if chunks > _MOST_CHUNKS:
            raise ImageError(f"the PNG file has more than {_MOST_CHUNKS} chunks")
        if not seen and kind != b"IHDR":
            raise ImageError(f"the PNG file begins with a chunk {kind!r}, not IHDR")
        if kind == b"IHDR":
            width, height, bits, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, content)
            if length != 13 or color not in _CHANNELS:
                raise ImageError(f"the PNG file's header of {length} bytes with colour type {color} is none")
            check_size(width, height, max_image_pixels)
        elif kind == b"acTL":
            frames = int.from_bytes(data[content : content + 4])
            if frames > 1:
                raise ImageAnimated(f"{frames} frames; send one picture")
        elif kind == b"eXIf" and kind not in seen:
            orientation = read_orientation(data[content : content + length])
        elif kind == b"IDAT":
            pixel_bytes += length
        if kind in {b"IHDR", b"PLTE", b"tRNS"} and kind in seen:
            raise ImageError(f"the PNG file has two chunks {kind!r}")
        if kind in {b"PLTE", b"tRNS"} and length > 768:
            raise ImageError(f"the PNG file has a chunk {kind!r} of {length} bytes")
        if kind in {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}:
            kept.append(view[content - 8 : position])
        elif chunks - len(kept) >= _MOST_OTHER_CHUNKS:
            raise ImageError(f"the PNG file has more than {_MOST_OTHER_CHUNKS} chunks beside those of its picture")
        if kind in {b"zTXt", b"iTXt", b"iCCP"}:
            texts.append(view[_deflated_begin(kind, data, content, content + length) : content + length])
        seen.add(kind)
    _check_texts(texts)
    row_bytes = 1 + (width * bits * _CHANNELS[color] + 7) // 8
    if pixel_bytes * _MOST_INFLATION < row_bytes * height:
        raise ImageTruncated(f"{pixel_bytes} bytes of pixels in a PNG file cannot make {width}x{height}")
    check_excess("PNG", pixel_bytes, row_bytes * height)
    transparent = color in {4, 6} or b"tRNS" in seen
    wide_grey = bits == 16 and color == 0
    # 4 bytes a pixel of what Pillow decodes, and 4 of RGB made of it or 3 of an array; rows beside if interlaced.
    peak_bytes = width * height * (8 if transparent or wide_grey or color in {0, 3} else 7)
    if interlaced:
        peak_bytes += 2 * row_bytes * height
    whole = len(kept) == chunks + 1 and position == len(data)
    return Header("PNG", width, height, peak_bytes, orientation, data if whole else b"".join(kept))


def _deflated_begin(kind: bytes, data: bytes, begin: int, end: int) -> int:
    """Where in a text or profile the part begins that is compressed; `end` or more if nothing is."""
    keyword_end = data.find(b"\0", begin, end) + 1 or end
    if kind != b"iTXt":
        return keyword_end + 1  # a method
    if data[keyword_end : keyword_end + 1] != b"\1":
        return end
    language_end = data.find(b"\0", keyword_end + 2, end) + 1 or end
    return data.find(b"\0", language_end, end) + 1 or end  # the keyword in it


def _check_texts(texts: Sequence[memoryview]) -> None:
    """Refuse texts that would take very much memory. Few files have so many that it takes a look to know."""
    left, deflated_bytes = _MOST_TEXT_BYTES, sum(map(len, texts))
    if deflated_bytes * _MOST_INFLATION <= left:
        return
    if deflated_bytes > _MOST_DEFLATED_BYTES:
        raise ImageError(
            f"the compressed texts and the profile of the PNG file have {deflated_bytes} bytes, and "
            f"{_MOST_DEFLATED_BYTES} may"
        )
    for text in texts:
        inflate = zlib.decompressobj()
        rest: bytes | memoryview = text
        while rest and left >= 0:
            try:
                left -= len(inflate.decompress(rest, 1 << 20))
            except zlib.error:
                break  # junk, which takes nothing
            rest = inflate.unconsumed_tail
        if left < 0:
            raise ImageError(f"the texts and the profile of the PNG file inflate to more than {_MOST_TEXT_BYTES} bytes")
