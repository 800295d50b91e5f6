"""JPEG: segments of marker, length and content, then scans of entropy-coded data."""

import re
import struct

from server.errors import FormatUnsupported, ImageError, ImageTruncated
from server.headers.exif import read_orientation
from server.headers.header import UPRIGHT, Header, check_excess, check_size, is_excess

_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_RESTARTS = range(0xD0, 0xD8)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # those are tables
_DECODED_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
_PROGRESSIVE_FRAMES = {0xC2, 0xCA}
_JFIF, _EXIF, _ADOBE, _COMMENT = 0xE0, 0xE1, 0xEE, 0xFE
_APPLICATION = range(0xE0, 0xF0)

_MOST_SEGMENTS = 5000
"""A profile has up to 255, previews and depth maps of some megabytes hundreds."""

_MOST_JUNK_BYTES = 4096
"""Between segments, which decoders skip byte by byte."""

_MOST_EXIFS = 10
"""A file has one; some that were edited have two."""

MOST_SCANS = 100
"""Every scan of a progressive JPEG goes over the whole picture; encoders write ten, and a hundred make a bomb."""

_USUAL_SCANS, _MOST_SCANNED_PIXELS = 20, 1_000_000_000
"""Of a large picture fewer scans are allowed, so that none takes much longer than the largest one does with ten; so
many always are."""

# In entropy-coded data 0xff is followed by 0 or is a restart; runs of 0xff are padding.
_MARKER, _END = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]"), re.compile(rb"\xff\xd9")

_STEP_BYTES = 1 << 20
"""Searched in one go: between two steps other threads have their turn."""


def read_jpeg(data: bytes, max_image_pixels: int) -> Header:
    """The header, and the file without previews, profiles and texts. Counts the scans of a progressive one."""
    kept: list[bytes | memoryview] = [data[:2]]
    view = memoryview(data)
    orientation: int | None = None
    frame: bytes | None = None
    progressive, segments, exifs, junk_bytes, dropped_bytes = False, 0, 0, 0, 0
    position = 2
    while True:
        begin = data.find(b"\xff", position)
        marker = data[begin + 1] if begin >= 0 else data[len(data)]  # raises IndexError: the file is at its end
        junk_bytes += begin - position
        if junk_bytes > _MOST_JUNK_BYTES:
            raise ImageError(f"the JPEG file has more than {_MOST_JUNK_BYTES} bytes that belong to nothing")
        if marker == 0xFF:
            position, junk_bytes = begin + 1, junk_bytes + 1
            continue
        if marker in {0x00, _TEM, _SOI} or marker in _RESTARTS:
            position, junk_bytes = begin + 2, junk_bytes + 2
            continue
        if marker == _EOI:
            raise ImageTruncated("the JPEG file ends before its picture begins")
        (length,) = struct.unpack_from(">H", data, begin + 2)
        content, position = begin + 4, begin + 2 + length
        segments += 1
        if segments > _MOST_SEGMENTS:
            raise ImageError(f"the JPEG file has more than {_MOST_SEGMENTS} segments before its picture")
        if length < 2:
            raise ImageError(f"the JPEG file has a segment of {length} bytes")
        if position > len(data):
            raise ImageTruncated(f"the JPEG file ends within a segment of {length} bytes")
        if marker in _FRAMES:
            if frame is not None:
                raise ImageError("the JPEG file has two headers of a picture")
            frame = data[content:position]
            progressive = marker in _PROGRESSIVE_FRAMES
            _check_frame(marker, frame, max_image_pixels)
        elif marker == _EXIF and data.startswith(b"Exif\0\0", content):
            exifs += 1
            if exifs > _MOST_EXIFS:
                raise ImageError(f"the JPEG file has more than {_MOST_EXIFS} segments of EXIF data")
            orientation = orientation or read_orientation(data[content:position])
        if (marker in _APPLICATION and marker not in {_JFIF, _ADOBE}) or marker == _COMMENT:
            dropped_bytes += length + 2
        else:
            kept.append(view[begin:position])
        if marker == _SOS:
            break
    if frame is None:
        raise ImageError("the JPEG file has a scan before the header of its picture")
    layers = data[content]
    scans = 1
    height, width = struct.unpack_from(">HH", frame, 1)
    raw_bytes = 4 * width * height
    if progressive or layers < frame[5]:
        most = min(MOST_SCANS, max(_USUAL_SCANS, _MOST_SCANNED_PIXELS // max(1, width * height)))
        scans, end = _count_scans(data, position, most)
    elif data.endswith(b"\xff\xd9", position) and not is_excess(len(data) - position, raw_bytes):
        end = len(data)  # as a rule; there is no need to search
    else:
        found = _search(_END, data, position)
        if found is None:
            raise ImageTruncated("the JPEG file ends before the picture does")
        end = found.end()
    check_excess("JPEG", end - position, raw_bytes)
    file = b"".join([*kept, view[position:end]]) if dropped_bytes else data
    peak_bytes = width * height * (8 if frame[5] != 3 else 4)
    if progressive or layers < frame[5]:
        peak_bytes += 2 * _coefficients(frame)
    return Header("JPEG", width, height, peak_bytes, orientation or UPRIGHT, file, slow=scans > _USUAL_SCANS)


def _check_frame(marker: int, frame: bytes, max_image_pixels: int) -> None:
    bits, height, width, layers = struct.unpack_from(">BHHB", frame)
    check_size(width, height, max_image_pixels)
    if marker not in _DECODED_FRAMES:
        raise FormatUnsupported(f"JPEG of a kind that hardly anything reads (SOF{marker - 0xC0}) is not supported")
    if bits != 8:
        raise FormatUnsupported(f"JPEG with {bits} bits a channel is not supported; send 8")
    if layers not in {1, 3, 4} or len(frame) < 6 + 3 * layers:
        raise ImageError(f"the JPEG file's header says that the picture has {layers} channels")


def _count_scans(data: bytes, position: int, most: int) -> tuple[int, int]:
    """How many there are, and where they end. `position`: within the first one.

    Refuses more than `most` of them, and a file without its end.
    """
    scans = 1
    for _ in range(_MOST_SEGMENTS):
        found = _search(_MARKER, data, position)
        if found is None:
            raise ImageTruncated(f"the JPEG file ends in its scan {scans}")
        marker = data[found.start() + 1]
        if marker == _EOI:
            return scans, found.end()
        if marker == _SOS:
            scans += 1
            if scans > most:
                raise ImageError(f"the JPEG file has more than {most} scans")
        (length,) = struct.unpack_from(">H", data, found.end())
        position = found.end() + length
    raise ImageError(f"the JPEG file has more than {_MOST_SEGMENTS} segments between its scans")


def _search(marker: re.Pattern[bytes], data: bytes, position: int) -> re.Match[bytes] | None:
    steps = range(position, len(data), _STEP_BYTES)
    found = (marker.search(data, begin, begin + _STEP_BYTES + 1) for begin in steps)  # one byte of the next step's
    return next(filter(None, found), None)


def _coefficients(frame: bytes) -> int:
    """Of all channels, of which a decoder keeps those of the whole picture where scans refine it."""
    height, width = struct.unpack_from(">HH", frame, 1)
    factors = [(frame[at] >> 4, frame[at] & 15) for at in range(7, 7 + 3 * frame[5], 3)]
    most_across, most_down = max(factor[0] for factor in factors), max(factor[1] for factor in factors)
    if min(min(factor) for factor in factors) < 1:
        raise ImageError("the JPEG file's header says that a channel has no samples")
    return sum(width * height * across * down // (most_across * most_down) for across, down in factors)
