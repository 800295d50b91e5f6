import random

import pytest
from starlette.datastructures import Headers

from server.errors import BadBody, TooManyImages
from tests.server.bodies import split
from tests.server.pictures import encode, rectangle

BOUNDARY = "frontier"
FORM = Headers({"content-type": f"multipart/form-data; boundary={BOUNDARY}"})


def form(*parts: tuple[str, bytes], end: bytes = b"--\r\n") -> bytes:
    body = b""
    for name, content in parts:
        body += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="x.png"\r\n'.encode()
        body += b"Content-Type: image/png\r\n\r\n" + content + b"\r\n"
    return body + f"--{BOUNDARY}".encode() + end


def test_parts_come_in_order_whatever_they_hold() -> None:
    contents = [b"one\r\n--front", b"", b"\r\n\r\n", b"BM" + bytes(range(256)) * 300]
    body = form(*(("images" if index % 2 else "image", content) for index, content in enumerate(contents)))
    assert split(body, FORM, 4) == contents


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
        split(body, FORM, 4)


@pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=" + "b" * 500])
def test_forms_need_a_boundary(boundary: str) -> None:
    with pytest.raises(BadBody, match="boundary|Boundary"):
        split(form(("images", b"x")), Headers({"content-type": "multipart/form-data" + boundary}), 4)


def test_ten_thousand_parts_stop_at_the_limit() -> None:
    with pytest.raises(TooManyImages, match="more than 4 images"):
        split(form(*[("images", b"x")] * 10_000), FORM, 4)


def test_a_parts_content_type_is_a_guess_from_its_files_name_and_nobody_is_held_to_it() -> None:
    data = encode(rectangle(), "JPEG")
    assert b"Content-Type: image/png" in form(("images", data))
    assert split(form(("images", data)), FORM, 1) == [data]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (form(("images", b"x\r\n--frontierx")), "a boundary's line goes on behind it"),
        (form(("images", b"\r\n--frontier - \r\n")), "a boundary's line goes on behind it"),
        (b"preamble\r\n" + form(("images", b"x")), "begins with b'preamble"),
        (b"--frontier", "ends before its closing boundary"),
        (b"--frontier\r\nA: b", "ends before its closing boundary"),
        (b"--frontier\r\nA: " + b"b" * 9000, "header of a part has more than 8192 bytes"),
        (form(('images"; x="' + ";" * 5000, b"x")), "5003 semicolons in the header of a part"),
    ],
)
def test_a_form_that_is_not_quite_one_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(BadBody, match=message):
        split(body, FORM, 4)


def test_blanks_around_a_form_are_allowed() -> None:
    body = b"\r\n" + form(("images", b"x")).replace(b"--frontier\r\n", b"--frontier \t\r\n") + b"epilogue\r\n"
    assert split(body, FORM, 1) == [b"x"]


@pytest.mark.parametrize("size", [1000, 70_000, 1_000_000])
def test_a_file_may_have_almost_boundaries_anywhere(size: int) -> None:
    rng = random.Random(size)
    content = b"BM" + b"".join(rng.choice((b"\r\n--frontie", b"\r\n", b"--", b"\r", b"x")) for _ in range(size // 4))
    assert split(form(("images", content), ("image", content[:-1])), FORM, 2) == [content, content[:-1]]


@pytest.mark.parametrize(
    "header",
    [
        b"Content-Disposition: form-data; name=images; filename=x.jpg; filename*=utf-8''x.jpg",
        b'content-disposition:form-data;filename="a;b;c.jpg";name="images"',
        b'Content-Disposition: form-data; name="images"; filename="' + b";" * 255 + b'.jpg"',
        b'Content-Disposition: form-data; name="images"; filename="say \\"x; name=y\\".jpg"\r\nContent-Length: 1',
        b'X: y\r\nContent-Transfer-Encoding: binary\r\nContent-Disposition: form-data; name="images"',
    ],
)
def test_a_parts_header_as_clients_write_it(header: bytes) -> None:
    assert split(b"--frontier\r\n" + header + b"\r\n\r\nx\r\n--frontier--", FORM, 1) == [b"x"]


def test_what_follows_the_form_is_nothing_to_it() -> None:
    body = form(("images", b"x")) + form(("file", b"y")) + b"\r\n--frontier, again" + bytes(100_000)
    assert split(body, FORM, 1) == [b"x"]


@pytest.mark.parametrize("cut", range(1, 130))
def test_a_form_cut_anywhere_is_no_form(cut: int) -> None:
    with pytest.raises(BadBody):
        split(form(("images", b"x"))[: -cut - 2], FORM, 1)
