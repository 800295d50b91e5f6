"""A request's body: it is taken apart while it comes in, and of what comes only the image files are kept."""

from collections.abc import AsyncIterable, Callable, Mapping
from typing import Protocol

from server.base64_json import Base64Json
from server.errors import BodyTooLarge, ImageError, ImageMislabelled, MediaTypeUnsupported
from server.form import Form
from server.headers import Format, format_of
from server.upload import Upload

_HINT = "send multipart/form-data with parts named images, one image/* file, or application/json"

_LONGEST_TYPE = 1000

_TYPE_OF_FORMAT: dict[Format, str] = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}
_FORMAT_OF_TYPE = {media_type: name for name, media_type in _TYPE_OF_FORMAT.items()} | {"image/jpg": "JPEG"}


class Reader(Protocol):
    """Takes a body of one media type apart."""

    def write(self, piece: bytes) -> None:
        """The next piece, of any size. Raises what is wrong as soon as it is here."""

    def close(self) -> list[bytes | ImageError]:
        """The image files, at least one, in their order; what is wrong with one alone stands in its place."""


async def read_images(
    chunks: AsyncIterable[bytes],
    headers: Mapping[str, str],
    max_images: int,
    max_body_bytes: int,
    received: Callable[[int], None] = lambda _: None,
) -> list[bytes | ImageError]:
    """The image files of a body, at least one, in their order; what is wrong with one alone stands in its place.

    `check_media_type` has let the headers pass. Raises BodyTooLarge, BadBody or TooManyImages as soon as it is known;
    the rest is not read. `received` is told the size of every piece before it is kept; what it raises ends the reading.
    """
    reader = reader_for(headers, max_images)
    await _read(chunks, max_body_bytes, received, reader.write)
    return reader.close()


async def read_body(chunks: AsyncIterable[bytes], max_body_bytes: int) -> bytes:
    """The whole of a small body. Raises BodyTooLarge."""
    pieces: list[bytes] = []
    await _read(chunks, max_body_bytes, lambda _: None, pieces.append)
    return b"".join(pieces)


async def _read(
    chunks: AsyncIterable[bytes],
    max_body_bytes: int,
    received: Callable[[int], None],
    write: Callable[[bytes], None],
) -> None:
    size = 0
    async for chunk in chunks:
        if not chunk:  # as the last one is
            continue
        size += len(chunk)
        if size > max_body_bytes:  # whatever the request said of its length
            raise BodyTooLarge(f"more than {max_body_bytes} bytes")
        received(len(chunk))
        write(chunk)


def check_media_type(headers: Mapping[str, str]) -> None:
    """Refuse, before the body is read, what could not be taken apart."""
    if len(headers.get("content-type", "")) > _LONGEST_TYPE:
        raise MediaTypeUnsupported(f"a content type of more than {_LONGEST_TYPE} characters")
    media_type = _media_type(headers)
    if media_type not in {"multipart/form-data", "application/json"} and not media_type.startswith("image/"):
        raise MediaTypeUnsupported(f"content type {media_type[:100]!r}: {_HINT}" if media_type else _HINT)
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise MediaTypeUnsupported(f"content encoding {encoding[:100]!r}: send the body as it is")


def reader_for(headers: Mapping[str, str], max_images: int) -> Reader:
    """By the media type, which `check_media_type` has let pass. Raises BadBody for a form without a boundary."""
    media_type = _media_type(headers)
    if media_type == "multipart/form-data":
        return Form(headers["content-type"], max_images)
    if media_type == "application/json":
        return Base64Json(max_images)
    return _Raw(media_type)


class _Raw:
    """A body that is one image file."""

    def __init__(self, media_type: str) -> None:
        self._media_type = media_type
        self._upload = Upload()
        self.write = self._upload.write

    def close(self) -> list[bytes | ImageError]:
        data = self._upload.close()
        return [data if isinstance(data, ImageError) else _check_label(data, self._media_type)]


def _media_type(headers: Mapping[str, str]) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _check_label(body: bytes, media_type: str) -> bytes | ImageError:
    """`body`, or an error where its sender calls it what it is not; `image/*` calls it nothing in particular."""
    labelled, found = _FORMAT_OF_TYPE.get(media_type), format_of(body)
    if labelled is None or found is None or labelled == found:
        return body
    return ImageMislabelled(
        f"sent as {media_type}, but it is a {found} file; send it as {_TYPE_OF_FORMAT[found]} or image/*"
    )
