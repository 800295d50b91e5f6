import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.datastructures import Headers

from server.body import read_body, read_images
from server.errors import BadBody, BodyTooLarge, ImageMislabelled, MediaTypeUnsupported
from tests.server.bodies import chunks, split
from tests.server.pictures import encode, rectangle

RAW = Headers({"content-type": "image/*"})
FORM = Headers({"content-type": "multipart/form-data; boundary=frontier"})
JSON = Headers({"content-type": "application/json"})


def test_bodies_are_put_together() -> None:
    assert asyncio.run(read_body(chunks(b"ab", b"", b"cd"), 4)) == b"abcd"
    assert asyncio.run(read_body(chunks(), 4)) == b""
    with pytest.raises(BodyTooLarge, match="more than 4 bytes"):
        asyncio.run(read_body(chunks(b"abc", b"de"), 4))


def test_every_piece_is_told_before_it_is_kept() -> None:
    told: list[int] = []
    assert asyncio.run(read_images(chunks(b"ab", b"", b"cde"), RAW, 1, 5, told.append)) == [b"abcde"]
    assert told == [2, 3]
    with pytest.raises(KeyError):
        asyncio.run(read_images(chunks(b"ab", b"never asked for"), RAW, 1, 50, {}.__getitem__))


def test_a_body_without_end_is_left_at_the_limit() -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield bytes(1000)

    with pytest.raises(BodyTooLarge, match="more than 3500 bytes"):
        asyncio.run(read_images(endless(), RAW, 1, 3500))
    assert taken == 4


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (FORM, b"no boundary but this text, which is long enough to know"),
        (FORM, b"--frontier, and a line that goes on"),
        (FORM, b'--frontier\r\nContent-Disposition: form-data; name="others"\r\n\r\n'),
        (FORM, b"--frontier\r\n" + b"A: b\r\n" * 2000),
        (JSON, b'{"images": [' + b"[]," * 10_000),
        (JSON, b'{"images": [{"b64": "' + b"A" * 200 + b"\\x"),
    ],
)
def test_what_is_wrong_ends_the_reading(headers: Headers, body: bytes) -> None:
    async def bodies() -> AsyncIterator[bytes]:
        yield body
        pytest.fail("asked for more")

    with pytest.raises(BadBody):
        asyncio.run(read_images(bodies(), headers, 4, 1 << 20))


def test_raw_images_are_taken_as_they_are() -> None:
    for kind in ("image/jpeg", "IMAGE/PNG", "image/x-anything; q=1"):
        assert split(b"data", Headers({"content-type": kind}), 1) == [b"data"]


@pytest.mark.parametrize("kind", ["", "text/plain", "application/octet-stream", "application/x-www-form-urlencoded"])
def test_other_types_are_refused_with_what_to_send(kind: str) -> None:
    with pytest.raises(MediaTypeUnsupported, match="send multipart/form-data"):
        split(b"x", Headers({"content-type": kind}), 1)


def test_compressed_bodies_are_refused() -> None:
    with pytest.raises(MediaTypeUnsupported, match="gzip"):
        split(b"x", Headers({"content-type": "image/png", "content-encoding": "gzip"}), 1)


def test_long_content_types_are_refused() -> None:
    with pytest.raises(MediaTypeUnsupported, match="more than 1000 characters"):
        split(b"x", Headers({"content-type": "multipart/form-data; " + 'a=";' * 1000}), 1)


@pytest.mark.parametrize(
    ("media_type", "file_format", "right"),
    [
        ("image/jpeg", "PNG", "image/png"),
        ("image/png; charset=utf-8", "WEBP", "image/webp"),
        ("IMAGE/JPG", "BMP", "image/bmp"),
        ("image/tiff", "JPEG", "image/jpeg"),
    ],
)
def test_a_raw_picture_that_is_called_another_is_refused(media_type: str, file_format: str, right: str) -> None:
    data = encode(rectangle(), file_format)
    (error,) = split(data, Headers({"content-type": media_type}), 1)
    assert isinstance(error, ImageMislabelled)
    assert error.status == 415
    name = media_type.partition(";")[0].lower()
    assert error.message == f"sent as {name}, but it is a {file_format} file; send it as {right} or image/*"


@pytest.mark.parametrize("media_type", ["image/*", "image/jpeg", "image/jpg", "image/pjpeg", "image/anything"])
def test_a_raw_picture_that_is_called_nothing_else_is_taken(media_type: str) -> None:
    data = encode(rectangle(), "JPEG")
    assert split(data, Headers({"content-type": media_type}), 1) == [data]
