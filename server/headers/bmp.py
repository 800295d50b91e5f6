"""BMP: a header of one of seven sizes, a palette, rows."""

import struct

from server.errors import FormatUnsupported, ImageError, ImageTruncated
from server.headers.header import UPRIGHT, Header, check_size

_FILE_HEADER_BYTES = 14
_OLDEST_HEADER_BYTES = 12
_HEADER_BYTES = (40, 52, 56, 64, 108, 124)
_DEPTHS = (1, 4, 8, 16, 24, 32)
_RAW, _BITFIELDS = 0, 3
_COMPRESSIONS = {1: "run-length compression", 2: "run-length compression", 4: "a JPEG inside", 5: "a PNG inside"}
_MOST_COLORS = 256


def read_bmp(data: bytes, max_image_pixels: int) -> Header:
    """The header. Pillow decodes run-length compression in Python, a second for 16 megapixels: it is not served."""
    (header_bytes,) = struct.unpack_from("<I", data, _FILE_HEADER_BYTES)
    compression, colors = _RAW, 0
    if header_bytes == _OLDEST_HEADER_BYTES:
        width, height, _, bits = struct.unpack_from("<HHHH", data, _FILE_HEADER_BYTES + 4)
    elif header_bytes in _HEADER_BYTES:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, _FILE_HEADER_BYTES + 4)
        (colors,) = struct.unpack_from("<I", data, _FILE_HEADER_BYTES + 32)
    else:
        raise ImageError(f"the BMP file's header says that it has {header_bytes} bytes, which none has")
    height = abs(height)  # negative where the first row is the topmost
    if width < 1 or height < 1:
        raise ImageError(f"the BMP file's header says that the picture has {width}x{height} pixels")
    check_size(width, height, max_image_pixels)
    if compression not in {_RAW, _BITFIELDS}:
        name = _COMPRESSIONS.get(compression, f"compression {compression}")
        raise FormatUnsupported(f"BMP with {name} is not supported; send one without, or a PNG")
    if bits not in _DEPTHS:
        raise ImageError(f"the BMP file's header says that a pixel has {bits} bits, which none has")
    if bits <= 8 and colors > _MOST_COLORS:
        raise ImageError(f"the BMP file's header says that its palette has {colors} colours")
    row_bytes = (width * bits + 31) // 32 * 4
    if _FILE_HEADER_BYTES + header_bytes + row_bytes * height > len(data):
        raise ImageTruncated(f"a BMP file of {len(data)} bytes cannot have {width}x{height} pixels of {bits} bits")
    return Header("BMP", width, height, width * height * 8, UPRIGHT, data)
