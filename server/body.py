"""A request's body, and the image files in it."""

import base64
import binascii
from collections.abc import AsyncIterable
from typing import TYPE_CHECKING

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers

from server.errors import BadBody, BodyTooLarge, ImageError, MediaTypeUnsupported, TooManyImages

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

PART_NAMES = ("images", "image")
_HINT = "send multipart/form-data with parts named images, one image/* file, or application/json"


async def read_body(chunks: AsyncIterable[bytes], max_body_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLarge as soon as it is, whatever the request said of its length."""
    parts: list[bytes] = []
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > max_body_bytes:
            raise BodyTooLarge(f"more than {max_body_bytes} bytes")
        parts.append(chunk)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def check_media_type(headers: Headers) -> None:
    """Refuse, before the body is read, what `split_images` could not take apart."""
    media_type = _media_type(headers)
    if media_type not in {"multipart/form-data", "application/json"} and not media_type.startswith("image/"):
        raise MediaTypeUnsupported(f"content type {media_type[:100]!r}: {_HINT}" if media_type else _HINT)
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise MediaTypeUnsupported(f"content encoding {encoding[:100]!r}: send the body as it is")


def split_images(body: bytes, headers: Headers, max_images: int) -> list[bytes | ImageError]:
    """The image files in the body, at least one, in their order.

    Raises BadBody, TooManyImages or MediaTypeUnsupported; what is wrong with one image alone stands in its place.
    """
    check_media_type(headers)
    media_type = _media_type(headers)
    if media_type == "multipart/form-data":
        _, options = parse_options_header(headers["content-type"])
        return [*_split_multipart(body, options.get(b"boundary", b""), max_images)]
    if media_type == "application/json":
        return _split_json(body, max_images)
    return [body]


def _media_type(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _split_multipart(body: bytes, boundary: bytes, max_images: int) -> list[bytes]:
    if not boundary:
        raise BadBody("multipart/form-data without a boundary")
    parts = _Parts(max_images)
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise BadBody(f"not well-formed multipart/form-data: {error}") from error
    if not parts.finished:
        raise BadBody("the multipart body ends before its closing boundary")
    if not parts.images:
        raise BadBody("no part named images or image")
    return parts.images


class _Parts:
    """Collects the parts as the parser meets them."""

    def __init__(self, max_images: int) -> None:
        self.images: list[bytes] = []
        self.finished = False
        self._max_images = max_images
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._content: list[bytes] = []

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._check_name,
            "on_part_data": lambda data, start, end: self._content.append(data[start:end]),
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        if len(self.images) == self._max_images:
            raise TooManyImages(f"more than {self._max_images} images in one request")
        self._disposition = b""
        self._content = []

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _check_name(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name not in PART_NAMES:
            raise BadBody(f"a part named {name[:100]!r}: files go in parts named images, options in the query string")

    def _end(self) -> None:
        self.images.append(b"".join(self._content))

    def _finish(self) -> None:
        self.finished = True


def _split_json(body: bytes, max_images: int) -> list[bytes | ImageError]:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadBody(f"not well-formed JSON: {error}") from error
    items = content.get("images") if isinstance(content, dict) else None
    if not isinstance(items, list) or not items or content.keys() != {"images"}:
        raise BadBody('expected {"images": [{"b64": "..."}]} with at least one image')
    if len(items) > max_images:
        raise TooManyImages(f"{len(items)} images exceed {max_images} in one request")
    for index, item in enumerate(items):
        if not isinstance(item, dict) or item.keys() != {"b64"} or not isinstance(item["b64"], str):
            found = f"keys {', '.join(sorted(item))[:100]}" if isinstance(item, dict) else type(item).__name__
            raise BadBody(f'images[{index}]: expected {{"b64": "..."}}, found {found}; URLs are not fetched')
    return [_from_base64(item["b64"]) for item in items]


def _from_base64(text: str) -> bytes | ImageError:
    if text.startswith("data:"):  # as a browser's FileReader gives it
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # some encoders break lines
    except (binascii.Error, ValueError) as error:
        return ImageError(f"not base64: {error}")
