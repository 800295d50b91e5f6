"""What the header of a picture's file says, and what every format's reader checks."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from server.errors import ImageTooLarge

Format: TypeAlias = Literal["JPEG", "PNG", "WEBP", "BMP", "TIFF"]

LONGEST_SIDE_PX = 65_535
"""JPEG's own limit. A picture of 1x40000000 is within any limit of pixels, and takes seconds to resize."""

UPRIGHT = 1
"""The EXIF orientation of a picture that is stored as it is shown."""


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
