"""A request's body, and the image files in it."""

import binascii
import io
import re
from collections.abc import AsyncIterable, Callable

import orjson
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers

from server.errors import BadBody, BodyTooLarge, ImageError, ImageMislabelled, MediaTypeUnsupported, TooManyImages
from server.headers import Format, format_of

PART_NAMES = ("images", "image")
_HINT = "send multipart/form-data with parts named images, one image/* file, or application/json"

_LONGEST_TYPE = 1000
_LONGEST_BOUNDARY = 256  # RFC 2046 allows 70
_LONGEST_PART_HEADER = 8192
_PADDING = re.compile(rb"[ \t]{0,100}\r\n")
_BAD_FORM = "not well-formed multipart/form-data"
_CUT_FORM = "the multipart body ends before its closing boundary"
_MOST_OTHER_VALUES = 100
_PIECE = 1 << 20  # characters of base64; between pieces other threads have their turn

_TYPE_OF_FORMAT: dict[Format, str] = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}
_FORMAT_OF_TYPE = {media_type: name for name, media_type in _TYPE_OF_FORMAT.items()} | {"image/jpg": "JPEG"}


async def read_body(
    chunks: AsyncIterable[bytes], max_body_bytes: int, received: Callable[[int], None] = lambda _: None
) -> bytes:
    """The whole body. Raises BodyTooLarge as soon as it is, whatever the request said of its length.

    `received` is told the size of every piece before it is kept; what it raises ends the reading.
    """
    body: bytes | None = None
    pieces = io.BytesIO()  # grows in place: pieces that are joined take their memory twice
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > max_body_bytes:
            raise BodyTooLarge(f"more than {max_body_bytes} bytes")
        received(len(chunk))
        if size == len(chunk):
            body = chunk
            continue
        if body:
            pieces.write(body)
            body = None
        pieces.write(chunk)
    return pieces.getvalue() if body is None else body


def check_media_type(headers: Headers) -> None:
    """Refuse, before the body is read, what `split_images` could not take apart."""
    if len(headers.get("content-type", "")) > _LONGEST_TYPE:
        raise MediaTypeUnsupported(f"a content type of more than {_LONGEST_TYPE} characters")
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
    return [_check_label(body, media_type)]


def _media_type(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _split_multipart(body: bytes, boundary: bytes, max_images: int) -> list[bytes]:
    """The contents of the parts, by RFC 2046 and without leniency."""
    if not boundary:
        raise BadBody("multipart/form-data without a boundary")
    if len(boundary) > _LONGEST_BOUNDARY:
        raise BadBody(f"multipart/form-data with a boundary of {len(boundary)} bytes; 70 are allowed")
    delimiter = b"\r\n--" + boundary
    images: list[bytes] = []
    if not body:
        raise BadBody(_CUT_FORM)
    opening = delimiter if body.startswith(b"\r\n") else delimiter[2:]
    if not body.startswith(opening):
        raise BadBody(f"{_BAD_FORM}: it begins with {body[:20]!r} and not with its boundary")
    position = len(opening)
    while not body.startswith(b"--", position):
        padding = _PADDING.match(body, position)
        if padding is None:
            raise BadBody(
                _CUT_FORM if position + 2 > len(body) else f"{_BAD_FORM}: a boundary's line goes on behind it"
            )
        if len(images) == max_images:
            raise TooManyImages(f"more than {max_images} images in one request")
        begin = _check_part_header(body, padding.end())
        end = body.find(delimiter, begin)
        if end < 0:
            raise BadBody(_CUT_FORM)
        images.append(body[begin:end])
        position = end + len(delimiter)
    if not images:
        raise BadBody("no part named images or image")
    return images


def _check_part_header(body: bytes, position: int) -> int:
    """Where the content begins of the part whose header begins at `position`."""
    end = body.find(b"\r\n\r\n", position - 2, position + _LONGEST_PART_HEADER)
    if end < 0:
        if position + _LONGEST_PART_HEADER < len(body):
            raise BadBody(f"{_BAD_FORM}: the header of a part has more than {_LONGEST_PART_HEADER} bytes")
        raise BadBody(_CUT_FORM)
    disposition = b""
    for line in body[position:end].split(b"\r\n"):
        field, _, value = line.partition(b":")
        if field.strip().lower() == b"content-disposition":
            disposition = value
    _, options = parse_options_header(disposition.strip())
    name = options.get(b"name", b"").decode("utf-8", "replace")
    if name not in PART_NAMES:
        raise BadBody(f"a part named {name[:100]!r}: files go in parts named images, options in the query string")
    return end + 4


def _split_json(body: bytes, max_images: int) -> list[bytes | ImageError]:
    # Counted before it is parsed: of 32 MB a parser makes ten million lists. Base64 has none of these characters.
    objects = body.count(b"{") - 1
    if objects > max_images + _MOST_OTHER_VALUES:
        raise TooManyImages(f"{objects} objects in a list, and {max_images} images may be in one request")
    values = body.count(b"[") + body.count(b",")
    if values > 4 * max_images + _MOST_OTHER_VALUES:
        raise BadBody(f"not well-formed JSON: {values} lists and commas for {max_images} images at most")
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
    decoded, rest = io.BytesIO(), b""
    try:
        for begin in range(0, len(text), _PIECE):
            # Some encoders break lines.
            piece = rest + text[begin : begin + _PIECE].encode("ascii").translate(None, b" \t\r\n\v\f")
            is_last = begin + _PIECE >= len(text)
            # All, or whole groups of four before the padding, which only the end may have.
            whole = len(piece) if is_last else len(piece.partition(b"=")[0]) // 4 * 4
            decoded.write(binascii.a2b_base64(piece[:whole], strict_mode=True))
            rest = piece[whole:]
            if len(rest) > 4:
                raise ValueError("data after the padding")
    except ValueError as error:  # binascii's own, or not ASCII
        return ImageError(f"not base64: {error}")
    return decoded.getvalue()


def _check_label(body: bytes, media_type: str) -> bytes | ImageError:
    """`body`, or an error where its sender calls it what it is not; `image/*` calls it nothing in particular."""
    labelled, found = _FORMAT_OF_TYPE.get(media_type), format_of(body)
    if labelled is None or found is None or labelled == found:
        return body
    return ImageMislabelled(
        f"sent as {media_type}, but it is a {found} file; send it as {_TYPE_OF_FORMAT[found]} or image/*"
    )
