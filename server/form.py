"""multipart/form-data, taken apart while it comes in: by RFC 2046 and without leniency."""

import re
from collections.abc import Callable

from python_multipart.multipart import parse_options_header

from server.errors import BadBody, ImageError, TooManyImages
from server.upload import Upload

PART_NAMES = ("images", "image")

_LONGEST_BOUNDARY = 256  # RFC 2046 allows 70
_LONGEST_PART_HEADER = 8192
_MOST_SEMICOLONS = 1000
"""In what names a part: a file may be called so, but each takes the event loop a microsecond."""

_EXCERPT_BYTES = 20
_PADDING = re.compile(rb"[ \t]{0,100}\r\n")
_PADDING_SO_FAR = re.compile(rb"[ \t]{0,100}\r?")
_BAD_FORM = "not well-formed multipart/form-data"
_CUT_FORM = "the multipart body ends before its closing boundary"
_LINE_GOES_ON = f"{_BAD_FORM}: a boundary's line goes on behind it"


class Form:
    """Takes a form piece by piece. Of a file it holds a boundary's length beside the file, of all else a part's header.

    What is wrong, BadBody or TooManyImages, is raised as soon as it is here.
    """

    def __init__(self, content_type: str, max_images: int) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        if not boundary:
            raise BadBody("multipart/form-data without a boundary")
        if len(boundary) > _LONGEST_BOUNDARY:
            raise BadBody(f"multipart/form-data with a boundary of {len(boundary)} bytes; 70 are allowed")
        self._delimiter = b"\r\n--" + boundary
        self._max_images = max_images
        self._images: list[bytes | ImageError] = []
        self._upload = Upload()
        self._held = b""  # what the step must see together with what comes
        self._step: Callable[[Form, bytes, int], int] = Form._opening

    def write(self, piece: bytes) -> None:
        """The next piece, of any size."""
        data, position = self._held + piece if self._held else piece, 0
        while True:
            step = self._step
            position = step(self, data, position)
            if self._step is step:  # it needs more
                break
        self._held = data[position:]

    def close(self) -> list[bytes | ImageError]:
        """The contents of the parts, at least one, in their order."""
        if self._step is Form._opening and self._held:
            raise _begins_otherwise(self._held)
        if self._step is Form._line and len(self._held) >= 2:
            raise BadBody(_LINE_GOES_ON)
        if self._step is not Form._epilogue:
            raise BadBody(_CUT_FORM)
        if not self._images:
            raise BadBody("no part named images or image")
        return self._images

    # A step takes what it can of `data` from `position` on, returns where what is left begins, and names the next step.

    def _opening(self, data: bytes, position: int) -> int:
        opening = self._delimiter if data.startswith(b"\r\n") else self._delimiter[2:]
        if data.startswith(opening):
            self._step = Form._line
            return len(opening)
        if len(data) >= max(_EXCERPT_BYTES, len(self._delimiter)):
            raise _begins_otherwise(data)
        return position

    def _line(self, data: bytes, position: int) -> int:
        """The rest of a boundary's line."""
        if data.startswith(b"--", position):
            self._step = Form._epilogue
            return position
        padding = _PADDING.match(data, position)
        if padding is not None:
            if len(self._images) == self._max_images:
                raise TooManyImages(f"more than {self._max_images} images in one request")
            self._step = Form._header
            return padding.end() - 2  # a header without lines ends with this line break
        if len(data) - position >= 2 and not _PADDING_SO_FAR.fullmatch(data, position):
            raise BadBody(_LINE_GOES_ON)
        return position

    def _header(self, data: bytes, position: int) -> int:
        """A part's header, with the line break before it."""
        begin = position + 2
        end = data.find(b"\r\n\r\n", position, begin + _LONGEST_PART_HEADER)
        if end < 0:
            if begin + _LONGEST_PART_HEADER < len(data):
                raise BadBody(f"{_BAD_FORM}: the header of a part has more than {_LONGEST_PART_HEADER} bytes")
            return position
        _check_name(data[begin:end])
        self._upload = Upload()
        self._step = Form._content
        return end + 4

    def _content(self, data: bytes, position: int) -> int:
        end = data.find(self._delimiter, position)
        if end < 0:
            known = max(position, len(data) - len(self._delimiter) + 1)  # what follows may begin a boundary
            self._upload.write(data[position:known])
            return known
        self._upload.write(data[position:end])
        self._images.append(self._upload.close())
        self._step = Form._line
        return end + len(self._delimiter)

    def _epilogue(self, data: bytes, _: int) -> int:
        return len(data)


def _begins_otherwise(data: bytes) -> BadBody:
    return BadBody(f"{_BAD_FORM}: it begins with {data[:_EXCERPT_BYTES]!r} and not with its boundary")


def _check_name(header: bytes) -> None:
    disposition = b""
    for line in header.split(b"\r\n"):
        field, _, value = line.partition(b":")
        if field.strip().lower() == b"content-disposition":
            disposition = value
    if (semicolons := disposition.count(b";")) > _MOST_SEMICOLONS:
        raise BadBody(f"{_BAD_FORM}: {semicolons} semicolons in the header of a part, {_MOST_SEMICOLONS} may be")
    _, options = parse_options_header(disposition.strip())
    name = options.get(b"name", b"").decode("utf-8", "replace")
    if name not in PART_NAMES:
        raise BadBody(f"a part named {name[:100]!r}: files go in parts named images, options in the query string")
