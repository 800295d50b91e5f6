import asyncio
import base64
from collections.abc import AsyncIterator

import orjson
import pytest
from starlette.datastructures import Headers

from server.body import read_body, split_images
from server.errors import BadBody, BodyTooLarge, ImageError, MediaTypeUnsupported, TooManyImages

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
