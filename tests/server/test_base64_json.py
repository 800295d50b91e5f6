import base64
import random
from collections.abc import Callable

import orjson
import pytest
from starlette.datastructures import Headers

from server.errors import BadBody, FormatUnsupported, ImageError, TooManyImages
from tests.server.bodies import split

JSON = Headers({"content-type": "application/json; charset=utf-8"})
FILE = b"BM" + bytes(range(256)) * 3


def one(text: bytes) -> bytes | ImageError:
    """What a string is, as JSON has it between its quotes."""
    (image,) = split(b'{"images": [{"b64": "' + text + b'"}]}', JSON, 1)
    return image


def test_json_images() -> None:
    encoded = base64.b64encode(b"\x89PNG").decode()
    body = orjson.dumps({"images": [{"b64": encoded}, {"b64": "data:image/png;base64," + encoded}, {"b64": ""}]})
    assert split(body, JSON, 3) == [b"\x89PNG", b"\x89PNG", b""]


def test_base64_in_lines_is_understood() -> None:
    data = bytes(range(256))
    assert split(orjson.dumps({"images": [{"b64": base64.encodebytes(data).decode()}]}), JSON, 1) == [data]


@pytest.mark.parametrize("size", [3 << 18, (3 << 18) + 1, 4_000_000, 4_000_001, 4_000_002])
@pytest.mark.parametrize("encoding", [base64.b64encode, base64.encodebytes])
def test_base64_of_megabytes_is_understood(size: int, encoding: Callable[[bytes], bytes]) -> None:
    data = b"BM" + random.Random(size).randbytes(size - 2)
    assert split(orjson.dumps({"images": [{"b64": encoding(data).decode() + "\n"}]}), JSON, 1) == [data]


@pytest.mark.parametrize("wrong", ["AA==", "*", "A", "=" * 3_000_000, "=" + "A" * 3_000_000])
def test_base64_that_is_wrong_after_a_megabyte_is_seen(wrong: str) -> None:
    body = orjson.dumps({"images": [{"b64": "A" * (1 << 20) + wrong + "A" * (1 << 20)}]})
    (image,) = split(body, JSON, 1)
    assert isinstance(image, ImageError)


def test_bad_base64_costs_only_its_own_image() -> None:
    good, bad, foreign = split(b'{"images": [{"b64": "AAAA"}, {"b64": "A"}, {"b64": "\xc3\xa9"}]}', JSON, 3)
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
        split(body, JSON, 3)


def test_too_many_json_images() -> None:
    with pytest.raises(TooManyImages, match="3 images exceed 2"):
        split(orjson.dumps({"images": [{"b64": ""}] * 3}), JSON, 2)


def test_data_urls_have_a_comma_and_are_as_many_as_allowed() -> None:
    body = orjson.dumps({"images": [{"b64": "data:image/png;base64,AAAA"}] * 64})
    assert split(body, JSON, 64) == [b"\0\0\0"] * 64


def test_json_beside_the_images_is_short() -> None:
    with pytest.raises(BadBody, match="more than 6144 bytes beside the images"):
        split(b'{"images": [' + b"[]," * 5_000 + b"[]]}", JSON, 4)
    with pytest.raises(TooManyImages, match="more than 4 images"):
        split(b'{"images": [' + b"{}," * 5_000 + b"{}]}", JSON, 4)
    with pytest.raises(TooManyImages, match="more than 4 images"):
        split(orjson.dumps({"images": [{"b64": "A" * 1000}] * 5}), JSON, 4)


def test_json_may_be_written_for_people() -> None:
    text = base64.b64encode(FILE).decode()
    body = orjson.dumps({"images": [{"b64": text}] * 32}, option=orjson.OPT_INDENT_2)
    assert split(body, JSON, 32) == [FILE] * 32


@pytest.mark.parametrize("size", [*range(80, 110), 1000, 1001, 1002])
@pytest.mark.parametrize("prefix", ["", "data:image/bmp;base64,"])
def test_strings_of_any_length_are_understood(size: int, prefix: str) -> None:
    data = FILE[:size]
    assert one((prefix + base64.b64encode(data).decode()).encode()) == data


@pytest.mark.parametrize(
    "escapes", [((b"/", b"\\/"),), ((b"+", b"\\u002B"), (b"=", b"\\u003d")), ((b"A", b"\\u0041"),)]
)
@pytest.mark.parametrize("size", [5, 90, 770])
def test_escapes_are_understood(escapes: tuple[tuple[bytes, bytes], ...], size: int) -> None:
    text = base64.b64encode(FILE[:size])
    for letter, escape in escapes:
        text = text.replace(letter, escape)
    assert one(text) == FILE[:size]
    assert one(b"\\u0064ata:;base64," + text) == FILE[:size]


@pytest.mark.parametrize("size", [3, 90, 768])
def test_four_signs_of_padding_are_none(size: int) -> None:
    text = base64.b64encode(FILE[:size])
    assert one(text + b"=" * (4 - len(text) % 4)) == FILE[:size]


@pytest.mark.parametrize("begin", [b"", b"A" * 300])
@pytest.mark.parametrize(
    "text",
    [
        b"\\\\" * 100,
        b'\\"' * 100,
        b'\\\\\\"' * 100,
        b"\\\\\\\\u0041",
        "\u00e9\u4e2d\U0001f600".encode(),
        b"\\u00e9",
        b"\\ud83d\\ude00",
        b"*\\ud83d\\ude00" * 50,
        b"=",
        b"AA=A",
        b"A" * 5,
        b"AAA=" * 2,
        b"AA==" + b"=" * 300,
        b"\\b",
    ],
)
def test_strings_that_are_no_base64_end_where_they_end(begin: bytes, text: bytes) -> None:
    for end in (b"", b"A" * 300):
        bad = b'{"b64": "' + begin + text + end + b'"}'
        good = b'{"b64": "' + base64.b64encode(FILE) + b'"}'
        first, second, third = split(b'{"images": [' + b", ".join([good, bad, good]) + b"]}", JSON, 3)
        assert first == third == FILE
        assert isinstance(second, ImageError)
        assert second.message.startswith("not base64: ")


@pytest.mark.parametrize("begin", [b"", b"A" * 300, b"*" * 300])
@pytest.mark.parametrize(
    "text",
    [b"\\", b"\\x", b"\\u00g0", b"\\ud83d", b"\\ud83dA", b"\\ude00", b"\n", b"\xff", b"\xc3", b"\xe4\xb8", b"\0"],
)
def test_strings_that_are_no_json_are_refused(begin: bytes, text: bytes) -> None:
    for end in (b"", b"A" * 300):
        with pytest.raises(BadBody, match="not well-formed JSON"):
            one(begin + text + end)


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 6, 300, 700, 1030, 1040])
def test_json_that_is_cut_is_refused(cut: int) -> None:
    body = orjson.dumps({"images": [{"b64": base64.b64encode(FILE).decode()}]})
    with pytest.raises(BadBody, match="not well-formed JSON"):
        split(body[:-cut], JSON, 1)


def test_backslashes_outside_of_strings_are_no_json() -> None:
    text = base64.b64encode(FILE)
    with pytest.raises(BadBody, match="not well-formed JSON"):
        split(b'{"images": [{"b64": \\"' + text + b'"}]}', JSON, 1)


def test_numbers_of_images_cannot_be_given() -> None:
    """Each string that is put aside leaves a number; only a string as long could be taken for one, and goes aside."""
    number = b"0" * 128
    good = b'{"b64": "' + base64.b64encode(FILE) + b'"}'
    for text in (number, number[1:], b"0", b"\\u0030" * 21):
        first, second = split(b'{"images": [' + good + b', {"b64": "' + text + b'"}]}', JSON, 2)
        assert first == FILE
        assert second != FILE


def test_names_may_be_long_and_are_not_told() -> None:
    with pytest.raises(BadBody, match=r"keys \.\.\., a; URLs"):
        split(b'{"images": [{"a": 1, "' + b"x" * 1000 + b'": 2}]}', JSON, 2)
    with pytest.raises(BadBody, match="expected"):
        split(b'{"' + b"x" * 1000 + b'": 2}', JSON, 2)


def test_of_what_is_no_picture_only_that_is_known() -> None:
    error = one(base64.b64encode(b"GIF89a" + bytes(5000)))
    assert isinstance(error, FormatUnsupported)
    assert error.message.startswith("GIF is not supported")
