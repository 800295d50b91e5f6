"""WebP: a RIFF container of chunks of kind, length and content."""

import struct

from server.errors import ImageAnimated, ImageError, ImageTruncated
from server.headers.exif import read_orientation
from server.headers.header import UPRIGHT, Header, check_excess, check_size

_CONTAINER_BYTES = 12
_ALPHA_FLAG, _ANIMATION_FLAG = 0x10, 0x02
_MOST_CHUNKS = 1000

_PEAK_BYTES = 12
"""Of a pixel: libwebp's canvas, its copy of it for a next frame, and the bytes that Python gets; then only the last
and the RGB picture made of them."""


def read_webp(data: bytes, max_image_pixels: int) -> Header:
    """The header, and of the file only what makes pixels. Refuses animations."""
    (riff_bytes,) = struct.unpack_from("<I", data, 4)
    if 8 + riff_bytes > len(data):
        raise ImageTruncated(f"the WebP file says that it has {8 + riff_bytes} bytes, and {len(data)} are there")
    end = 8 + riff_bytes
    view = memoryview(data)
    kept: list[bytes | memoryview] = []
    canvas: tuple[int, int] | None = None
    picture: tuple[int, int] | None = None
    orientation, frames, chunks = UPRIGHT, 0, 0
    position = _CONTAINER_BYTES
    while position + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, position)
        content, after = position + 8, position + 8 + length
        if after > end:
            raise ImageTruncated(f"the WebP file ends within a chunk {kind!r} of {length} bytes")
        chunks += 1
        if chunks > _MOST_CHUNKS:
            raise (
                ImageAnimated(f"more than {_MOST_CHUNKS} frames; send one picture")
                if frames > 1
                else ImageError(f"the WebP file has more than {_MOST_CHUNKS} chunks")
            )
        position = after + length % 2  # chunks begin at even places
        if kind == b"VP8X" and not kept:
            flags = data[content]
            width, height = (1 + int.from_bytes(data[content + at : content + at + 3], "little") for at in (4, 7))
            canvas = width, height
            check_size(width, height, max_image_pixels)
            flags &= _ALPHA_FLAG | _ANIMATION_FLAG
            kept += view[content - 8 : content], bytes([flags]), view[content + 1 : position]
        elif kind in {b"VP8 ", b"VP8L"} and picture is None:
            picture = _lossy_size(data, content) if kind == b"VP8 " else _lossless_size(data, content)
            check_size(*picture, max_image_pixels)
            kept.append(view[content - 8 : position])
        elif kind == b"ANMF":
            frames += 1
            kept.append(view[content - 8 : position])
        elif kind in {b"ALPH", b"ANIM"}:
            kept.append(view[content - 8 : position])
        elif kind == b"EXIF":
            orientation = read_orientation(data[content:after])
    if frames > 1:
        raise ImageAnimated(f"{frames} frames; send one picture")
    if not frames and picture is None:
        raise ImageTruncated("the WebP file has no picture")
    if canvas is not None and picture is not None and canvas != picture:
        raise ImageError(
            f"the WebP file's canvas has {canvas[0]}x{canvas[1]} pixels, its picture {picture[0]}x{picture[1]}"
        )
    width, height = canvas or picture or (0, 0)
    check_excess("WEBP", sum(map(len, kept)), 4 * width * height)
    file = b"".join([b"RIFF", struct.pack("<I", 4 + sum(map(len, kept))), b"WEBP", *kept])
    peak_bytes = width * height * _PEAK_BYTES + 3 * len(file)  # this copy, Pillow's and libwebp's
    return Header("WEBP", width, height, peak_bytes, orientation, file)


def _lossy_size(data: bytes, content: int) -> tuple[int, int]:
    tag, start_code, width, height = struct.unpack_from("<3s3sHH", data, content)
    if start_code != b"\x9d\x01\x2a" or tag[0] & 1:
        raise ImageError("the WebP file's picture does not begin as one")
    return width & 0x3FFF, height & 0x3FFF


def _lossless_size(data: bytes, content: int) -> tuple[int, int]:
    signature, bits = struct.unpack_from("<BI", data, content)
    if signature != 0x2F:
        raise ImageError("the WebP file's lossless picture does not begin as one")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
