"""One image file of a request's body, while it comes in."""

import io

from server.errors import ImageError
from server.headers import BEGINNING_BYTES, format_of, refusal
from server.malloc import LARGE_BYTES

_MOVED_BYTES = 512 << 10
"""A buffer that grows among other blocks leaves a hole each time that it moves: 7 MB of them, by the time that it is
large enough to lie by itself. From here on it does; of the room that it gets, only what is written to takes memory."""


class Upload:
    """Takes a file piece by piece. Of what is no picture, by its first bytes, only these are kept."""

    def __init__(self) -> None:
        self._size = 0
        self._only = b""  # most small files come in one piece, which is taken as it is
        self._pieces: io.BytesIO | None = None  # grows in place: pieces that are joined take their memory twice
        self._beginning: bytes | None = None  # of what is no picture
        self._blank = False

    def write(self, piece: bytes) -> None:
        """The next piece, of any size."""
        before = self._size
        self._size += len(piece)
        if self._beginning is not None:
            self._blank = self._blank and _is_blank(piece)
        elif not before:
            self._only = piece
        else:
            if self._pieces is None:
                self._pieces = io.BytesIO()
                self._pieces.write(self._only)
                self._only = b""
            self._pieces.write(piece)
            if before <= _MOVED_BYTES < self._size:
                begun, self._pieces = self._pieces.getvalue(), io.BytesIO(bytes(LARGE_BYTES))
                self._pieces.write(begun)
        if before <= BEGINNING_BYTES < self._size:
            self._let_go_unless_picture()

    def close(self) -> bytes | ImageError:
        """The file, or why it cannot be a picture; if it is short, a decoder will say so."""
        if self._beginning is not None:
            return refusal(self._beginning, self._size, blank=self._blank)
        return self._all()

    def _all(self) -> bytes:
        if self._pieces is None:
            return self._only
        self._pieces.truncate()  # where the next piece would be
        return self._pieces.getvalue()

    def _let_go_unless_picture(self) -> None:
        data = self._all()
        if format_of(data) is None:
            self._beginning, self._blank = data[:BEGINNING_BYTES], _is_blank(data)
            self._only, self._pieces = b"", None


def _is_blank(data: bytes) -> bool:
    return not data.lstrip(b"\0")
