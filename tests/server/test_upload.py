import random
import tracemalloc

import pytest

from server.errors import ImageError
from server.headers import read_header
from server.upload import Upload
from tests.server.pictures import encode, rectangle

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")


def put_together(data: bytes, size: int) -> bytes | ImageError:
    upload = Upload()
    for at in range(0, len(data), size):
        upload.write(data[at : at + size])
    return upload.close()


@pytest.mark.parametrize("size", [1, 5, 1023, 1024, 1025, 1 << 20])
@pytest.mark.parametrize("file_format", FORMATS)
def test_pictures_are_put_together(file_format: str, size: int) -> None:
    data = encode(rectangle(), file_format).ljust(5000, b"x")
    assert put_together(data, size) == data


@pytest.mark.parametrize("size", [100_000, 524_288, 524_289, 4_200_000, 10_000_000])
@pytest.mark.parametrize("piece", [65_536, 300_000, 6_000_000])
def test_large_pictures_are_put_together(size: int, piece: int) -> None:
    data = encode(rectangle(), "JPEG") + random.Random(size).randbytes(size)
    assert put_together(data, piece) == data


def test_one_piece_is_taken_as_it_is() -> None:
    data = encode(rectangle(), "JPEG")
    assert put_together(data, len(data)) is data


@pytest.mark.parametrize("size", [1, 5, 1023, 1024, 1025, 1 << 20])
@pytest.mark.parametrize(
    "data",
    [
        b"GIF89a" + bytes(5000),
        b"Dear server,\n" * 500,
        bytes(5000),
        bytes(1025),
        bytes(4000) + b"x",
        bytes(20) + b"x" * 2000,
        b"\n" * 1000 + b"<svg>" + b" " * 5000,
        b"\n" * 1021 + b"<svg>" + b" " * 5000,
        b"RIFF1234WAVE" + bytes(5000),
    ],
)
def test_what_is_no_picture_is_refused_as_if_all_of_it_had_been_kept(data: bytes, size: int) -> None:
    error = put_together(data, size)
    assert isinstance(error, ImageError)
    with pytest.raises(ImageError) as decoders:
        read_header(data, 1 << 20)
    assert (type(error), error.message) == (type(decoders.value), decoders.value.message)


@pytest.mark.parametrize("data", [b"", b"x", b"GIF89a", bytes(1024)])
def test_a_short_file_is_left_to_the_decoder(data: bytes) -> None:
    assert put_together(data, 10) == data


def test_of_what_is_no_picture_only_the_beginning_is_kept() -> None:
    upload = Upload()
    tracemalloc.start()
    try:
        for _ in range(1000):
            upload.write(b"x" * 10_000)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
