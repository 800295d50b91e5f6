"""Images as base64 in JSON, decoded while they come in."""

import binascii
import re

import orjson

from server.errors import BadBody, ImageError, TooManyImages
from server.upload import Upload

_EXPECTED = '{"images": [{"b64": "..."}]}'
_BAD_JSON = "not well-formed JSON"

_LONG = 128
"""A string of so many bytes is put aside. Its number stands in its place, in as many digits: no other is as long."""

_TEXT_BYTES, _TEXT_BYTES_AN_IMAGE = 4096, 512
"""The most that there may be beside the strings put aside: names, brackets, blanks and those numbers."""

_BLANKS = b" \t\r\n\v\f"  # some encoders break lines

# What cannot be read without what comes next: an escape, the first half of a character that takes two, part of UTF-8.
_UNFINISHED = re.compile(
    rb"(?:\\u[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?|\\(?:u[0-9a-fA-F]{0,3})?|[\xc2-\xf4][\x80-\xbf]{0,2})\Z"
)
_LONGEST_UNFINISHED = 11


class Base64Json:
    """Takes the JSON piece by piece; a long string is decoded as it comes, and only its image kept.

    What is wrong with the JSON, BadBody or TooManyImages, is raised as soon as it is here; what is wrong with an image
    stands in its place.
    """

    def __init__(self, max_images: int) -> None:
        self._max_images = max_images
        self._text = bytearray()  # all but the long strings
        self._most_text_bytes = _TEXT_BYTES + _TEXT_BYTES_AN_IMAGE * max_images
        self._images: list[bytes | ImageError] = []  # what was in the long strings
        self._string: _Base64 | None = None  # the long one that is coming
        self._held = b""

    def write(self, piece: bytes) -> None:
        """The next piece, of any size."""
        data = self._held + piece if self._held else piece
        plain = data  # with nothing in it that is escaped: a quote is one
        if b"\\" in data:
            plain = data.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        unfinished = _UNFINISHED.search(plain, max(0, len(data) - _LONGEST_UNFINISHED))
        position, end = 0, len(data) if unfinished is None else unfinished.start()
        while position < end:
            if self._string is None:
                begin = plain.find(b'"', position, end)
                if begin < 0:
                    begin = end
                self._add_text(data[position:begin])
                position = begin
                if begin == end:
                    break
                close = plain.find(b'"', begin + 1, end)
                if (end if close < 0 else close) - begin > _LONG:
                    self._begin_string()
                    position = begin + 1
                elif close < 0:
                    break  # until it is known whether it is long
                else:
                    self._add_text(data[begin : close + 1])
                    position = close + 1
            else:
                close = plain.find(b'"', position, end)
                self._string.write(data[position : end if close < 0 else close])
                position = end
                if close >= 0:
                    self._images.append(self._string.close())
                    self._string = None
                    position = close + 1
        self._held = data[position:]

    def close(self) -> list[bytes | ImageError]:
        """The images, at least one, in their order."""
        if self._string is not None:
            raise BadBody(f"{_BAD_JSON}: it ends within a string")
        self._add_text(self._held)
        try:
            content = orjson.loads(self._text)
        except orjson.JSONDecodeError as error:
            # Where that is, is known only if nothing was taken out.
            raise BadBody(f"{_BAD_JSON}: {error.msg if self._images else error}") from error
        items = content.get("images") if isinstance(content, dict) else None
        if not isinstance(items, list) or not items or content.keys() != {"images"}:
            raise BadBody(f"expected {_EXPECTED} with at least one image")
        if len(items) > self._max_images:
            raise TooManyImages(f"{len(items)} images exceed {self._max_images} in one request")
        for index, item in enumerate(items):
            if not isinstance(item, dict) or item.keys() != {"b64"} or not isinstance(item["b64"], str):
                found = f"keys {_names(item)}" if isinstance(item, dict) else type(item).__name__
                raise BadBody(f'images[{index}]: expected {{"b64": "..."}}, found {found}; URLs are not fetched')
        return [self._image(item["b64"]) for item in items]

    def _image(self, text: str) -> bytes | ImageError:
        if len(text) == _LONG:
            return self._images[int(text)]
        string = _Base64()
        string.write_text(text)
        return string.close()

    def _begin_string(self) -> None:
        if len(self._images) == self._max_images:
            raise TooManyImages(f"more than {self._max_images} images in one request")
        self._add_text(b'"%0*d"' % (_LONG, len(self._images)))
        self._string = _Base64()

    def _add_text(self, text: bytes) -> None:
        self._text += text
        if len(self._text) <= self._most_text_bytes:
            return
        if self._text.count(b"{", 0, self._most_text_bytes) - 1 > self._max_images:
            raise TooManyImages(f"more than {self._max_images} images in one request")
        raise BadBody(f"{_BAD_JSON}: more than {self._most_text_bytes} bytes beside the images; expected {_EXPECTED}")


class _Base64:
    """What a string has in base64; of a string that is none, only why."""

    def __init__(self) -> None:
        self._upload = Upload()
        self._error: ImageError | None = None
        self._begun = False
        self._in_prefix = False
        self._rest = b""  # of a group of four; with the padding, which only the end may have

    def write(self, piece: bytes) -> None:
        """The next characters as JSON has them, the first ones at once enough for `data:`. Raises BadBody."""
        try:
            text = orjson.loads(b'"%b"' % piece)
        except orjson.JSONDecodeError as error:
            raise BadBody(f"{_BAD_JSON}: {error.msg} in a string") from error
        self.write_text(text)

    def write_text(self, text: str) -> None:
        """The next characters."""
        if not self._begun:
            self._begun = True
            self._in_prefix = text.startswith("data:")  # as a browser's FileReader gives it
        if self._in_prefix:
            _, comma, text = text.partition(",")
            self._in_prefix = not comma
        if self._error is not None:
            return
        try:
            letters = self._rest + text.encode("ascii", "replace").translate(None, _BLANKS)
            whole = len(letters.partition(b"=")[0]) // 4 * 4
            self._upload.write(binascii.a2b_base64(letters[:whole], strict_mode=True))
            self._rest = letters[whole:]
            if len(self._rest) > 4:
                raise ValueError("data after the padding")
        except ValueError as error:  # binascii's own, too
            self._fail(error)

    def close(self) -> bytes | ImageError:
        """The file, or why there is none."""
        if self._error is None and self._rest != b"====":  # as some pad what needs none
            try:
                self._upload.write(binascii.a2b_base64(self._rest, strict_mode=True))
            except ValueError as error:
                self._fail(error)
        return self._upload.close() if self._error is None else self._error

    def _fail(self, error: ValueError) -> None:
        self._error = ImageError(f"not base64: {error}")
        self._upload, self._rest = Upload(), b""


def _names(item: dict[str, object]) -> str:
    return ", ".join(name if len(name) < _LONG else "..." for name in sorted(item))[:100]
