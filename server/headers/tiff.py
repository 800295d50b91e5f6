"""TIFF: a directory of tags, and strips or tiles of pixels where it says."""

import math
import struct
from itertools import accumulate

from server.errors import FormatUnsupported, ImageError, ImageTruncated
from server.headers.directory import LONG, RATIONAL, SHORT, UNDEFINED, Directory, read_directory
from server.headers.exif import ORIENTATION_TAG
from server.headers.header import UPRIGHT, Header, check_excess, check_size

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIP_OFFSETS, _SAMPLES, _ROWS_PER_STRIP, _STRIP_BYTES, _PLANAR = 273, 277, 278, 279, 284
_COLORS, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 320, 322, 323, 324, 325
_EXTRA_SAMPLES, _SAMPLE_FORMAT, _JPEG_TABLES = 338, 339, 347
_YCBCR_WEIGHTS, _YCBCR_SUBSAMPLING, _REFERENCE_BLACK_WHITE = 529, 530, 532

# The tags that say how pixels are stored, and the most values that each may have. Nothing else reaches the decoder.
_SHORT_LISTS = {
    _BITS: 6,
    _PHOTOMETRIC: 1,
    266: 1,  # order of bits
    292: 1,  # options of fax compressions
    293: 1,
    _PLANAR: 1,
    317: 1,  # predictor
    _COLORS: 3 << 8,
    _EXTRA_SAMPLES: 4,
    _SAMPLE_FORMAT: 6,
    _YCBCR_SUBSAMPLING: 2,
}
_RATIONALS = {_YCBCR_WEIGHTS: 3, _REFERENCE_BLACK_WHITE: 6}
_MOST_JPEG_TABLES_BYTES = 1 << 16
_MOST_SAMPLES = 6

_NO_COMPRESSION, _JPEG = 1, 7
_COMPRESSIONS = {_NO_COMPRESSION, 2, 3, 4, 5, _JPEG, 8, 32773, 32946}  # fax, LZW, JPEG, deflate, PackBits
_OTHER_COMPRESSIONS = {6: "JPEG as before 1995", 34712: "JPEG 2000", 34925: "LZMA", 50000: "Zstandard", 50001: "WebP"}
_COMPRESSION_NAMES = "none, LZW, deflate, PackBits, JPEG or fax"

_MOST_PAGES = 1000

_MOST_PIECES = 100_000
"""Strips or tiles, of a row or of 24x24 pixels of the largest picture; each makes objects of the interpreter."""

_SEPARATE_PLANES = 2
_LARGEST_TILE_PIXELS = 1 << 22

_WIDEST_USUAL_TILE_PX = 1024
"""A file of a narrower picture has all of such a tile's width."""


def read_tiff(data: bytes, max_image_pixels: int) -> Header:
    """The first picture's header, and a file of that picture alone. Further pages are left out."""
    try:
        return _read(data, max_image_pixels)
    except ValueError as error:
        raise ImageError(f"the TIFF file's directory cannot be read: {error}") from error


def _read(data: bytes, max_image_pixels: int) -> Header:
    directory = read_directory(data)
    _check_pages(directory)
    width, height = _one(directory, _WIDTH, 0), _one(directory, _HEIGHT, 0)
    if width < 1 or height < 1:
        raise ImageError(f"the TIFF file's directory says that the picture has {width}x{height} pixels")
    check_size(width, height, max_image_pixels)
    compression = _one(directory, _COMPRESSION, _NO_COMPRESSION)
    if compression not in _COMPRESSIONS:
        name = _OTHER_COMPRESSIONS.get(compression, f"number {compression}")
        raise FormatUnsupported(f"TIFF with compression {name} is not supported; send one with {_COMPRESSION_NAMES}")
    samples = _one(directory, _SAMPLES, 1)
    if not 1 <= samples <= _MOST_SAMPLES:
        raise ImageError(f"the TIFF file's directory says that a pixel has {samples} samples")
    tags: dict[int, tuple[int, ...]] = {
        tag: _several(directory, tag, most) for tag, most in _SHORT_LISTS.items() if tag in directory.entries
    }
    bits = sum(tags.get(_BITS, (1,))) if len(tags.get(_BITS, (1,))) > 1 else samples * tags.get(_BITS, (1,))[0]
    planes = samples if tags.get(_PLANAR, (1,))[0] == _SEPARATE_PLANES else 1
    tags |= {_WIDTH: (width,), _HEIGHT: (height,), _COMPRESSION: (compression,), _SAMPLES: (samples,)}
    place = _tiles if _TILE_OFFSETS in directory.entries else _strips
    tags |= place(directory, width, height, planes, bits if planes == 1 else bits // planes, compression)
    orientation = _one(directory, ORIENTATION_TAG, UPRIGHT)
    sizes = tags[_TILE_BYTES if _TILE_OFFSETS in tags else _STRIP_BYTES]
    # Fax turns fine patterns of one bit into five; nothing is decoded to less than a byte a pixel.
    stored_width = max(width, min(tags.get(_TILE_WIDTH, (0,))[0], _WIDEST_USUAL_TILE_PX))
    check_excess("TIFF", sum(sizes), (stored_width * max(bits, 8) + 7) // 8 * height)
    if sum(sizes) > len(data):
        raise ImageError("the TIFF file's strips or tiles overlap")
    file = _write(directory, tags)
    peak_bytes = width * height * (8 + (bits + 7) // 8) + 2 * len(file)
    return Header("TIFF", width, height, peak_bytes, orientation if 1 <= orientation <= 8 else UPRIGHT, file)


def _check_pages(directory: Directory) -> None:
    """Refuse pages without end. What is no directory ends them: it says nothing of the first page."""
    data, order = directory.data, directory.order
    big = data[2:4] in {b"\x2b\0", b"\0\x2b"}
    offset, count, entry_bytes = ("Q", "Q", 20) if big else ("I", "H", 12)
    ends, end = {directory.end}, directory.end
    while True:
        try:
            (start,) = struct.unpack_from(f"{order}{offset}", data, end)
            (tags,) = struct.unpack_from(f"{order}{count}", data, start)
        except (struct.error, OverflowError):  # where the file has ended, or no file reaches
            return
        if not start:
            return
        end = start + struct.calcsize(count) + tags * entry_bytes
        if end in ends:
            raise ImageError("the TIFF file's pages follow each other in a circle")
        ends.add(end)
        if len(ends) > _MOST_PAGES:
            raise ImageError(f"the TIFF file has more than {_MOST_PAGES} pages")


def _strips(
    directory: Directory, width: int, height: int, planes: int, bits: int, compression: int
) -> dict[int, tuple[int, ...]]:
    rows = min(height, _one(directory, _ROWS_PER_STRIP, height))
    if rows < 1:
        raise ImageError("the TIFF file's directory says that its strips have no rows")
    most, count = planes * height, planes * math.ceil(height / rows)
    tags = _pieces(directory, _STRIP_OFFSETS, _STRIP_BYTES, count, most, compression)
    if compression == _NO_COMPRESSION:
        tags[_STRIP_BYTES] = _raw_sizes(directory, tags[_STRIP_OFFSETS], rows, height, 1, (width * bits + 7) // 8)
    return tags | {_ROWS_PER_STRIP: (rows,)}


def _tiles(
    directory: Directory, width: int, height: int, planes: int, bits: int, compression: int
) -> dict[int, tuple[int, ...]]:
    across, down = _one(directory, _TILE_WIDTH, 0), _one(directory, _TILE_HEIGHT, 0)
    if across < 1 or down < 1 or across * down > max(_LARGEST_TILE_PIXELS, 4 * width * height):
        raise ImageError(
            f"the TIFF file's directory says that a picture of {width}x{height} has tiles of {across}x{down}"
        )
    abreast = math.ceil(width / across)
    most, count = planes * width * height, planes * abreast * math.ceil(height / down)
    tags = _pieces(directory, _TILE_OFFSETS, _TILE_BYTES, count, most, compression)
    if compression == _NO_COMPRESSION:
        tags[_TILE_BYTES] = _raw_sizes(directory, tags[_TILE_OFFSETS], down, height, abreast, (across * bits + 7) // 8)
    return tags | {_TILE_WIDTH: (across,), _TILE_HEIGHT: (down,)}


def _raw_sizes(
    directory: Directory, offsets: tuple[int, ...], rows: int, height: int, abreast: int, row_bytes: int
) -> tuple[int, ...]:
    """Of strips or tiles that are not compressed, of `rows` each and so many abreast: what the picture's rows take."""
    down = math.ceil(height / rows)
    last_rows = height - (down - 1) * rows
    sizes = tuple(
        row_bytes * (last_rows if index // abreast % down == down - 1 else rows) for index in range(len(offsets))
    )
    _check_end(directory, offsets, sizes)
    return sizes


def _check_end(directory: Directory, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    if max(map(int.__add__, offsets, sizes)) > len(directory.data):
        raise ImageTruncated("the TIFF file ends before its picture does")


def _pieces(
    directory: Directory, offsets_tag: int, bytes_tag: int, count: int, most: int, compression: int
) -> dict[int, tuple[int, ...]]:
    """Where the strips or tiles are, as many as the picture has; surplus ones, up to `most` in all, are left out."""
    if offsets_tag not in directory.entries:
        raise ImageError("the TIFF file's directory does not say where its pixels are")
    if (listed := directory.entries[offsets_tag].count) > most:
        raise ImageError(f"the TIFF file's directory has {listed} strips or tiles for a picture of {most} at most")
    found = min(
        directory.entries[offsets_tag].count, directory.entries.get(bytes_tag, directory.entries[offsets_tag]).count
    )
    if count > _MOST_PIECES:
        raise ImageError(f"the TIFF file's picture is in {count} strips or tiles; {_MOST_PIECES} may be")
    if found < count:
        raise ImageTruncated(f"the TIFF file's directory has {found} of {count} strips or tiles")
    offsets = directory.integers(offsets_tag, count)
    if bytes_tag not in directory.entries:
        if compression != _NO_COMPRESSION:
            raise ImageError("the TIFF file's directory does not say how long its strips or tiles are")
        return {offsets_tag: offsets}
    sizes = directory.integers(bytes_tag, count)
    if sizes == (0,):  # some old writers say so; libtiff, too, takes the rest of the file then
        sizes = (max(0, len(directory.data) - offsets[0]),)
    if compression != _NO_COMPRESSION:
        _check_end(directory, offsets, sizes)
    return {offsets_tag: offsets, bytes_tag: sizes}


def _one(directory: Directory, tag: int, default: int) -> int:
    return _several(directory, tag, 1)[0] if tag in directory.entries else default


def _several(directory: Directory, tag: int, most: int) -> tuple[int, ...]:
    count = directory.entries[tag].count
    if not 1 <= count <= most:
        raise ImageError(f"the TIFF file's directory has {count} values for tag {tag}, which has 1 to {most}")
    return directory.integers(tag, count)


def _write(directory: Directory, tags: dict[int, tuple[int, ...]]) -> bytes:
    """A file of the strips or tiles, one behind the other, and a directory of `tags` behind them."""
    order, data = directory.order, memoryview(directory.data)
    offsets_tag, bytes_tag = (_TILE_OFFSETS, _TILE_BYTES) if _TILE_OFFSETS in tags else (_STRIP_OFFSETS, _STRIP_BYTES)
    sizes = tags[bytes_tag]
    pieces = [data[place : place + size] for place, size in zip(tags[offsets_tag], sizes, strict=True)]
    *places, end = accumulate(sizes, initial=8)
    tags = tags | {offsets_tag: tuple(places)}
    contents: dict[int, tuple[int, int, bytes]] = {}  # type, count, values
    for tag, values in tags.items():
        kind, letter = (SHORT, "H") if max(values) < 1 << 16 else (LONG, "I")
        contents[tag] = kind, len(values), struct.pack(f"{order}{len(values)}{letter}", *values)
    for tag, count in _RATIONALS.items():
        entry = directory.entries.get(tag)
        if entry is not None and entry.kind == RATIONAL and entry.count == count:
            contents[tag] = RATIONAL, count, directory.content(tag)
    tables = directory.entries.get(_JPEG_TABLES)
    if tables is not None and tables.kind == UNDEFINED and tables.count <= _MOST_JPEG_TABLES_BYTES:
        contents[_JPEG_TABLES] = UNDEFINED, tables.count, directory.content(_JPEG_TABLES)
    start = end + end % 2
    values_at = start + 2 + 12 * len(contents) + 4
    entries, values_behind = b"", b""
    for tag, (kind, count, content) in sorted(contents.items()):
        value = content.ljust(4, b"\0")
        if len(content) > 4:
            value = struct.pack(f"{order}I", values_at + len(values_behind))
            values_behind += content + bytes(len(content) % 2)
        entries += struct.pack(f"{order}HHI", tag, kind, count) + value
    magic = directory.data[:2] + struct.pack(f"{order}HI", 42, start)
    directory_bytes = struct.pack(f"{order}H", len(contents)) + entries + bytes(4) + values_behind
    return b"".join([magic, *pieces, bytes(end % 2), directory_bytes])
