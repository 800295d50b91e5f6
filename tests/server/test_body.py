import asyncio
import base64
import random
from collections.abc import AsyncIterator, Callable

import orjson
import pytest
from starlette.datastructures import Headers

from server.body import read_body, split_images
from server.errors import BadBody, BodyTooLarge, ImageError, ImageMislabelled, MediaTypeUnsupported, TooManyImages
from tests.server.pictures import encode, rectangle

BOUNDARY = "frontier"
FORM = Headers({"content-type": f"multipart/form-data; boundary={BOUNDARY}"})
JSON = Headers({"content-type": "application/json; charset=utf-8"})


def form(*parts: tuple[str, bytes], end: bytes = b"--\r\n") -> bytes:
    body = b""
    for name, content in parts:
        body += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="x.png"\r\n'.encode()
        body += b"Content-Type: image/png\r\n\r\n" + content + b"\r\n"
    return body + f"--{BOUNDARY}".encode() + end


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def test_bodies_are_put_together() -> None:
    assert asyncio.run(read_body(chunks(b"ab", b"", b"cd"), 4)) == b"abcd"
    assert asyncio.run(read_body(chunks(), 4)) == b""


def test_every_piece_is_told_before_it_is_kept() -> None:
    told: list[int] = []
    assert asyncio.run(read_body(chunks(b"ab", b"", b"cde"), 5, told.append)) == b"abcde"
    assert told == [2, 0, 3]
    with pytest.raises(KeyError):
        asyncio.run(read_body(chunks(b"ab", b"never asked for"), 5, {}.__getitem__))


def test_a_body_without_end_is_left_at_the_limit() -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield bytes(1000)

    with pytest.raises(BodyTooLarge, match="more than 3500 bytes"):
        asyncio.run(read_body(endless(), 3500))
    assert taken == 4


def test_raw_images_are_taken_as_they_are() -> None:
    for kind in ("image/jpeg", "IMAGE/PNG", "image/x-anything; q=1"):
        assert split_images(b"data", Headers({"content-type": kind}), 1) == [b"data"]


def test_parts_come_in_order_whatever_they_hold() -> None:
    contents = [b"one\r\n--front", b"", b"\r\n\r\n", bytes(range(256)) * 300]
    body = form(*(("images" if index % 2 else "image", content) for index, content in enumerate(contents)))
    assert split_images(body, FORM, 4) == contents


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (form(("images", b"x"))[:-20], "ends before|not well-formed"),
        (form(("images", b"x"), end=b""), "ends before its closing boundary"),
        (form(), "no part named images|ends before|not well-formed"),
        (b"", "ends before its closing boundary"),
        (b"garbage", "not well-formed"),
        (form(("file", b"x")), "a part named 'file'"),
        (form(("images", b"x"), ("threshold", b"0.5")), "'threshold'.*query string"),
        (b"--frontier\r\n\r\nx\r\n--frontier--\r\n", "a part named ''"),
        (b"--frontier\r\n" + b"A: b\r\n" * 5000 + b"\r\nx\r\n--frontier--\r\n", "not well-formed"),
        (b"--frontier\r\nA" + b"b" * 100_000 + b": c\r\n\r\nx\r\n--frontier--\r\n", "not well-formed"),
    ],
)
def test_broken_forms_are_refused(body: bytes, message: str) -> None:
    with pytest.raises(BadBody, match=message):
        split_images(body, FORM, 4)


@pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=" + "b" * 500])
def test_forms_need_a_boundary(boundary: str) -> None:
    with pytest.raises(BadBody, match="boundary|Boundary"):
        split_images(form(("images", b"x")), Headers({"content-type": "multipart/form-data" + boundary}), 4)


def test_ten_thousand_parts_stop_at_the_limit() -> None:
    with pytest.raises(TooManyImages, match="more than 4 images"):
        split_images(form(*[("images", b"x")] * 10_000), FORM, 4)


def test_json_images() -> None:
    encoded = base64.b64encode(b"\x89PNG").decode()
    body = orjson.dumps({"images": [{"b64": encoded}, {"b64": "data:image/png;base64," + encoded}, {"b64": ""}]})
    assert split_images(body, JSON, 3) == [b"\x89PNG", b"\x89PNG", b""]


def test_base64_in_lines_is_understood() -> None:
    data = bytes(range(256))
    assert split_images(orjson.dumps({"images": [{"b64": base64.encodebytes(data).decode()}]}), JSON, 1) == [data]


@pytest.mark.parametrize("size", [3 << 18, (3 << 18) + 1, 4_000_000, 4_000_001, 4_000_002])
@pytest.mark.parametrize("encoding", [base64.b64encode, base64.encodebytes])
def test_base64_of_megabytes_is_understood(size: int, encoding: Callable[[bytes], bytes]) -> None:
    data = random.Random(size).randbytes(size)
    assert split_images(orjson.dumps({"images": [{"b64": encoding(data).decode() + "\n"}]}), JSON, 1) == [data]


@pytest.mark.parametrize("wrong", ["AA==", "*", "A", "=" * 3_000_000, "=" + "A" * 3_000_000])
def test_base64_that_is_wrong_after_a_megabyte_is_seen(wrong: str) -> None:
    body = orjson.dumps({"images": [{"b64": "A" * (1 << 20) + wrong + "A" * (1 << 20)}]})
    (image,) = split_images(body, JSON, 1)
    assert isinstance(image, ImageError)


def test_bad_base64_costs_only_its_own_image() -> None:
    good, bad, foreign = split_images(b'{"images": [{"b64": "AAAA"}, {"b64": "A"}, {"b64": "\xc3\xa9"}]}', JSON, 3)
    assert good == b"\0\0\0"
    assert isinstance(bad, ImageError)
    assert isinstance(foreign, ImageError)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not well-formed JSON"),
        (b"{", "not well-formed JSON"),
        (b"[" * 100_000, "not well-formed JSON"),
        (b'{"images": NaN}', "not well-formed JSON"),
        (b"[]", "expected"),
        (b"{}", "expected"),
        (b'{"images": []}', "at least one"),
        (b'{"images": {"b64": "AAAA"}}', "expected"),
        (b'{"images": [{"b64": "AAAA"}], "threshold": 1}', "expected"),
        (b'{"images": ["AAAA"]}', r"images\[0\]: .*found str"),
        (b'{"images": [{"b64": "AAAA"}, {"b64": 5}]}', r"images\[1\]"),
        (b'{"images": [{"url": "http://example.com/a.jpg"}]}', "keys url; URLs are not fetched"),
    ],
)
def test_other_json_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(BadBody, match=message):
        split_images(body, JSON, 3)


def test_too_many_json_images() -> None:
    with pytest.raises(TooManyImages, match="3 images exceed 2"):
        split_images(orjson.dumps({"images": [{"b64": ""}] * 3}), JSON, 2)


@pytest.mark.parametrize("kind", ["", "text/plain", "application/octet-stream", "application/x-www-form-urlencoded"])
def test_other_types_are_refused_with_what_to_send(kind: str) -> None:
    with pytest.raises(MediaTypeUnsupported, match="send multipart/form-data"):
        split_images(b"x", Headers({"content-type": kind}), 1)


def test_compressed_bodies_are_refused() -> None:
    with pytest.raises(MediaTypeUnsupported, match="gzip"):
        split_images(b"x", Headers({"content-type": "image/png", "content-encoding": "gzip"}), 1)


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
    (error,) = split_images(data, Headers({"content-type": media_type}), 1)
    assert isinstance(error, ImageMislabelled)
    assert error.status == 415
    name = media_type.partition(";")[0].lower()
    assert error.message == f"sent as {name}, but it is a {file_format} file; send it as {right} or image/*"


@pytest.mark.parametrize("media_type", ["image/*", "image/jpeg", "image/jpg", "image/pjpeg", "image/anything"])
def test_a_raw_picture_that_is_called_nothing_else_is_taken(media_type: str) -> None:
    data = encode(rectangle(), "JPEG")
    assert split_images(data, Headers({"content-type": media_type}), 1) == [data]


def test_a_parts_content_type_is_a_guess_from_its_files_name_and_nobody_is_held_to_it() -> None:
    data = encode(rectangle(), "JPEG")
    assert b"Content-Type: image/png" in form(("images", data))
    assert split_images(form(("images", data)), FORM, 1) == [data]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (form(("images", b"x\r\n--frontierx")), "a boundary's line goes on behind it"),
        (form(("images", b"\r\n--frontier - \r\n")), "a boundary's line goes on behind it"),
        (b"preamble\r\n" + form(("images", b"x")), "begins with b'preamble"),
        (b"--frontier", "ends before its closing boundary"),
        (b"--frontier\r\nA: b", "ends before its closing boundary"),
        (b"--frontier\r\nA: " + b"b" * 9000, "header of a part has more than 8192 bytes"),
    ],
)
def test_a_form_that_is_not_quite_one_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(BadBody, match=message):
        split_images(body, FORM, 4)


def test_blanks_around_a_form_are_allowed() -> None:
    body = b"\r\n" + form(("images", b"x")).replace(b"--frontier\r\n", b"--frontier \t\r\n") + b"epilogue\r\n"
    assert split_images(body, FORM, 1) == [b"x"]


def test_json_that_would_take_gigabytes_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.body.orjson.loads", lambda _: pytest.fail("parsed"))
    with pytest.raises(BadBody, match="200002 lists and commas for 4 images at most"):
        split_images(b'{"images": [' + b"[]," * 100_000 + b"[]]}", JSON, 4)
    with pytest.raises(TooManyImages, match="100001 objects in a list, and 4 images"):
        split_images(b'{"images": [' + b"{}," * 100_000 + b"{}]}", JSON, 4)


def test_data_urls_have_a_comma_and_are_as_many_as_allowed() -> None:
    body = orjson.dumps({"images": [{"b64": "data:image/png;base64,AAAA"}] * 64})
    assert split_images(body, JSON, 64) == [b"\0\0\0"] * 64


def test_long_content_types_are_refused() -> None:
    with pytest.raises(MediaTypeUnsupported, match="more than 1000 characters"):
        split_images(b"x", Headers({"content-type": "multipart/form-data; " + 'a=";' * 1000}), 1)
