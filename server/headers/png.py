"""PNG: a signature, then chunks of length, kind, content and checksum."""

import struct

from server.errors import ImageAnimated, ImageError, ImageTruncated
from server.headers.exif import read_orientation
from server.headers.header import UPRIGHT, Header, check_size

_SIGNATURE_BYTES = 8
_AROUND_BYTES = 12  # a chunk's length, kind and checksum
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type

_MOST_CHUNKS = 20_000
"""A file of 32 MB whose writer cuts pixels every 8 KB has 4,000. Each costs the interpreter time."""

_MOST_INFLATION = 1040
"""zlib makes at most 1032 bytes of one."""


def read_png(data: bytes, max_image_pixels: int) -> Header:
    """The header, and of the file only what makes pixels. Refuses animations, and files that cannot have all pixels."""
    view = memoryview(data)
    kept = [view[:_SIGNATURE_BYTES]]
    orientation, pixel_bytes, chunks = UPRIGHT, 0, 0
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
        seen.add(kind)
    row_bytes = 1 + (width * bits * _CHANNELS[color] + 7) // 8
    if pixel_bytes * _MOST_INFLATION < row_bytes * height:
        raise ImageTruncated(f"{pixel_bytes} bytes of pixels in a PNG file cannot make {width}x{height}")
    transparent = color in {4, 6} or b"tRNS" in seen
    wide_grey = bits == 16 and color == 0
    # 4 bytes a pixel of what Pillow decodes, and 4 of RGB made of it or 3 of an array; rows beside if interlaced.
    peak_bytes = width * height * (8 if transparent or wide_grey or color in {0, 3} else 7)
    if interlaced:
        peak_bytes += 2 * row_bytes * height
    whole = len(kept) == chunks + 1 and position == len(data)
    return Header("PNG", width, height, peak_bytes, orientation, data if whole else b"".join(kept))
