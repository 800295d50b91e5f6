"""The directory of tags at the front of a TIFF file; EXIF data has the same form."""

import struct
from dataclasses import dataclass

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, LONG8 = 1, 2, 3, 4, 5, 7, 16

_BYTES_OF = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_LETTER_OF = {BYTE: "B", SHORT: "H", LONG: "I", LONG8: "Q", 13: "I"}

_MOST_TAGS = 4096
"""Cameras write a hundred."""


class TooManyTags(ValueError):
    """A directory that is there, and longer than any."""


@dataclass(frozen=True)
class Entry:
    """One tag: its values lie at `offset`."""

    kind: int  # of a value, by TIFF's numbers
    count: int
    offset: int


@dataclass(frozen=True)
class Directory:
    """The tags of one directory, and the data that they lie in."""

    data: bytes
    order: str  # of bytes, as `struct` writes it
    entries: dict[int, Entry]
    end: int  # where it says where the next one is

    def integers(self, tag: int, count: int) -> tuple[int, ...]:
        """The first values of `tag`. Raises ValueError if they are no integers, struct.error where the data ends."""
        entry = self.entries[tag]
        if entry.kind not in _LETTER_OF:
            raise ValueError(f"tag {tag} has values of type {entry.kind}")
        return struct.unpack(f"{self.order}{count}{_LETTER_OF[entry.kind]}", self._content(entry, count))

    def content(self, tag: int) -> bytes:
        """The bytes of all values of `tag`. Raises struct.error if they are not there."""
        return self._content(self.entries[tag], self.entries[tag].count)

    def _content(self, entry: Entry, count: int) -> bytes:
        end = entry.offset + count * _BYTES_OF[entry.kind]
        if end > len(self.data):
            raise struct.error(f"values end at {end} of {len(self.data)}")
        return self.data[entry.offset : end]


def read_directory(data: bytes) -> Directory:
    """The first directory of a TIFF file, a large one (BigTIFF) too.

    Raises ValueError if there is none, and of this kind TooManyTags; struct.error if it is not all there.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        raise ValueError(f"neither II nor MM but {data[:2]!r}")
    (version,) = struct.unpack_from(f"{order}H", data, 2)
    if version not in {42, 43}:
        raise ValueError(f"version {version}")
    big = version == 43
    (start,) = struct.unpack_from(f"{order}Q", data, 8) if big else struct.unpack_from(f"{order}I", data, 4)
    if start >= len(data):
        raise struct.error(f"the directory is at {start} of {len(data)}")
    (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, start)
    entries: dict[int, Entry] = {}
    entry_bytes, value_bytes = (20, 8) if big else (12, 4)
    first = start + (8 if big else 2)
    if count > _MOST_TAGS:
        kind_of_error = TooManyTags if first + count * entry_bytes <= len(data) else ValueError
        raise kind_of_error(f"{count} tags in one directory")
    for position in range(first, first + count * entry_bytes, entry_bytes):
        tag, kind, values = struct.unpack_from(f"{order}HH{'Q' if big else 'I'}", data, position)
        if kind not in _BYTES_OF or tag in entries:
            continue  # the first counts
        offset = position + entry_bytes - value_bytes
        if values * _BYTES_OF[kind] > value_bytes:
            (offset,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, offset)
        entries[tag] = Entry(kind, values, offset)
    return Directory(data, order, entries, first + count * entry_bytes)
