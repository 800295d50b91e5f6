"""What the header of a picture's file says, and what every format's reader checks."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from server.errors import ImageError, ImageTooLarge

Format: TypeAlias = Literal["JPEG", "PNG", "WEBP", "BMP", "TIFF"]

LONGEST_SIDE_PX = 65_535
"""JPEG's own limit. A picture of 1x40000000 is within any limit of pixels, and takes seconds to resize."""

UPRIGHT = 1
"""The EXIF orientation of a picture that is stored as it is shown."""


_SPARE_BYTES = 1 << 20


@dataclass(frozen=True)
class Header:
    """A file that may be decoded: its picture is within the limits, and all of the file is there."""

    format: Format
    width: int  # px, as stored
    height: int
    peak_bytes: int  # about the most memory that decoding takes, the RGB picture included
    orientation: int  # as EXIF has it: 1 to 8
    file: bytes  # the file without what decoding has no use for: texts, profiles, previews, further pages
    slow: bool = False  # takes much longer than others of its size


def check_size(width: int, height: int, max_image_pixels: int) -> None:
    """Raise ImageTooLarge for a picture beyond the limits."""
    if width * height > max_image_pixels:
        raise ImageTooLarge(f"{width}x{height} exceeds {max_image_pixels} pixels")
    if max(width, height) > LONGEST_SIDE_PX:
        raise ImageTooLarge(f"{width}x{height}: a side exceeds {LONGEST_SIDE_PX} px")


def is_excess(size: int, raw_bytes: int) -> bool:
    """Whether `size` is far more than pixels take that have `raw_bytes` as they are."""
    return size > 2 * raw_bytes + _SPARE_BYTES


def check_excess(file_format: Format, size: int, raw_bytes: int) -> None:
    """Raise ImageError where the pixels take far more bytes in the file than they have as they are.

    Nobody compresses to that; such a file would be copied and handed around for a few pixels.
    """
    if is_excess(size, raw_bytes):
        raise ImageError(f"the {file_format} file has {size} bytes for a picture that has {raw_bytes} as it is")
