"""Which way up a picture is shown, by its EXIF data."""

import struct

from server.errors import ImageError
from server.headers.directory import SHORT, TooManyTags, read_directory
from server.headers.header import UPRIGHT

ORIENTATION_TAG = 274

_LONGEST_BYTES = 1 << 20
"""In a JPEG EXIF has 64 KB. Of more than this nobody reads the directory, which is at the front."""


def read_orientation(exif: bytes) -> int:
    """1 to 8; 1 where `exif` says nothing that makes sense: viewers show such a file as it is stored.

    Raises ImageError where it is a bomb for whoever reads all of it.
    """
    exif = exif[:_LONGEST_BYTES].removeprefix(b"Exif\0\0")
    try:
        directory = read_directory(exif)
        entry = directory.entries.get(ORIENTATION_TAG)
        if entry is None or entry.kind != SHORT:
            return UPRIGHT
        orientation = directory.integers(ORIENTATION_TAG, 1)[0]
    except TooManyTags as error:
        raise ImageError(f"the EXIF data have {error}") from error
    except (struct.error, IndexError, ValueError):
        return UPRIGHT
    return orientation if 1 <= orientation <= 8 else UPRIGHT
