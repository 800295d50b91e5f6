"""What files say of themselves, and what of them reaches a decoder."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base

from server.decode import decode
from server.errors import FormatUnsupported, ImageAnimated, ImageError, ImageTooLarge, ImageTruncated
from server.headers import format_of, read_header
from tests.server import hostile
from tests.server.pictures import RED, encode, rectangle

LIMIT = 1_000_000
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8))


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[Base.Orientation] = orientation
    data[Base.ImageDescription] = "x" * 5000
    return data


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_format_and_size_are_read(file_format: str) -> None:
    data = encode(NOISE, file_format)
    header = read_header(data, LIMIT)
    assert format_of(data) == header.format == file_format
    assert (header.width, header.height, header.orientation) == (80, 60, 1)
    assert header.peak_bytes >= 4 * 80 * 60


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_decoder_gets_pixels_and_no_metadata(file_format: str) -> None:
    data = encode(NOISE, file_format, exif=exif(6), icc_profile=b"profile" * 1000)
    header = read_header(data, LIMIT)
    assert header.orientation == 6
    assert b"x" * 5000 in data
    assert b"x" * 5000 not in header.file
    image = Image.open(io.BytesIO(header.file))
    assert not image.info.get("exif")
    assert not image.info.get("icc_profile")
    assert not image.getexif().get(Base.Orientation)
    assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(decode(encode(NOISE, file_format), LIMIT)))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "BMP"])
def test_a_plain_file_is_not_copied(file_format: str) -> None:
    data = encode(NOISE, file_format)
    assert read_header(data, LIMIT).file is data


def test_an_interlaced_png_is_read() -> None:
    rows = b"".join(
        bytes(1 + 3 * width) * height for width, height in ((1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4))
    )
    picture = decode(hostile.png(8, 8, zlib.compress(rows), interlaced=1), LIMIT)
    assert picture.size == (8, 8)


@pytest.mark.parametrize("byte_order", ["little", "big"])
def test_a_large_tiff_and_one_of_the_other_end(byte_order: str) -> None:
    data = encode(NOISE, "TIFF", big_tiff=True) if byte_order == "little" else motorola_tiff()
    assert np.array_equal(np.asarray(decode(data, LIMIT)), np.asarray(NOISE))


def motorola_tiff() -> bytes:
    pixels = np.asarray(NOISE).tobytes()
    tags = [
        (256, 3, 1, 80 << 16),
        (257, 3, 1, 60 << 16),
        (258, 3, 3, 8),
        (259, 3, 1, 1 << 16),
        (262, 3, 1, 2 << 16),
        (273, 4, 1, 14),
        (277, 3, 1, 3 << 16),
        (278, 3, 1, 60 << 16),
        (279, 4, 1, len(pixels)),
    ]
    content = struct.pack(">3H", 8, 8, 8) + pixels
    directory = struct.pack(">H", len(tags)) + b"".join(struct.pack(">HHII", *tag) for tag in tags) + bytes(4)
    return b"MM\0*" + struct.pack(">I", 8 + len(content)) + content + directory


def test_strips_and_tiles_and_compressions_show_the_same() -> None:
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        data = encode(NOISE, "TIFF", compression=compression, strip_size=80 * 3 * 7)
        assert np.array_equal(np.asarray(decode(data, LIMIT)), np.asarray(NOISE)), compression
    assert decode(encode(NOISE.convert("1"), "TIFF", compression="group4"), LIMIT).size == (80, 60)
    assert decode(encode(NOISE, "TIFF", compression="jpeg"), LIMIT).size == (80, 60)


def grey_in_tiles(side: int = 32) -> bytes:
    """NOISE in grey, in tiles that are stored from the last to the first."""
    pixels = np.zeros((64, 96), np.uint8)
    pixels[:60, :80] = np.asarray(NOISE.convert("L"))
    tiles = [pixels[top : top + side, left : left + side] for top in range(0, 60, side) for left in range(0, 80, side)]
    places = [8 + side * side * (len(tiles) - 1 - number) for number in range(len(tiles))]
    data = b"".join(tile.tobytes() for tile in reversed(tiles))
    at = 8 + len(data)
    data += struct.pack(f"<{2 * len(tiles)}I", *places, *[side * side] * len(tiles))
    more = [(322, 4, 1, side), (323, 4, 1, side), (324, 4, len(tiles), at), (325, 4, len(tiles), at + 4 * len(tiles))]
    tags = [tag for tag in hostile.grey_tags(80, 60) if tag[0] not in {273, 278, 279}]
    return hostile.tiff([*tags, *more], data)


def test_tiles_that_are_not_compressed_are_shown() -> None:
    for side in (16, 32):
        assert np.array_equal(np.asarray(decode(grey_in_tiles(side), LIMIT))[..., 0], np.asarray(NOISE.convert("L")))


@pytest.mark.parametrize("tag", [273, 324])
def test_the_end_of_every_strip_and_tile_is_looked_for(tag: int) -> None:
    """In the one file the tile that is stored last is the picture's first; in the other the strip is the only one."""
    data = grey_in_tiles() if tag == 324 else hostile.grey_tiff()
    read_header(data, LIMIT)
    entry = data.rindex(struct.pack("<HH", tag, 4))
    (place,) = struct.unpack_from("<I", data, entry + 8)
    at = place if tag == 324 else entry + 8
    moved = data[:at] + struct.pack("<I", len(data) - 32 * 32 + 1) + data[at + 4 :]
    with pytest.raises(ImageTruncated, match="ends before its picture"):
        read_header(moved, LIMIT)


def test_of_a_tiff_only_the_strips_are_kept() -> None:
    data = encode(
        NOISE, "TIFF", compression="tiff_lzw", strip_size=80 * 3 * 7, save_all=True, append_images=[NOISE] * 9
    )
    header = read_header(data + bytes(100_000), LIMIT)
    assert len(header.file) < len(data) / 5
    assert np.array_equal(np.asarray(decode(data, LIMIT)), np.asarray(NOISE))


def test_strips_over_each_other_are_refused() -> None:
    data = hostile.grey_tiff((257, 4, 1, 256), (278, 4, 1, 64), (273, 4, 4, 8), (279, 4, 4, 24))
    data = data[:8] + struct.pack("<8I", *[8] * 4, *[4096] * 4) + data[40:]
    with pytest.raises(ImageError, match="strips or tiles overlap"):
        read_header(data, LIMIT)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_what_follows_a_jpeg_is_left_out(options: dict[str, bool]) -> None:
    """As a film does that a telephone takes beside a picture."""
    data, film = encode(NOISE, "JPEG", comment=b"x" * 50, **options), bytes(5_000_000) + b"\xff\xd9"
    assert read_header(data + film, LIMIT).file == read_header(data, LIMIT).file
    assert np.array_equal(np.asarray(decode(data + film, LIMIT)), np.asarray(decode(data, LIMIT)))


@pytest.mark.parametrize("at", range(-3, 3))
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_the_end_of_a_long_jpeg_is_found_wherever_it_is(at: int, options: dict[str, bool]) -> None:
    data = encode(NOISE, "JPEG", comment=b"makes for a copy", **options)
    pixels = data.rindex(b"\xff\xda") + 2 if options else data.index(b"\xff\xda") + 2
    begin = pixels + int.from_bytes(data[pixels : pixels + 2])
    data = data[:-2] + b"x" * ((1 << 20) + at - (len(data) - 2 - begin)) + b"\xff\xd9"
    assert read_header(data + b"more", LIMIT).file.endswith(b"x\xff\xd9")
    with pytest.raises(ImageTruncated):
        read_header(data[:-1] + b"more", LIMIT)


@pytest.mark.parametrize(
    "make", [hostile.much_in_png, hostile.much_in_webp, hostile.much_in_tiff, hostile.much_in_jpeg]
)
def test_megabytes_for_a_few_pixels_are_refused(make: Callable[[], bytes]) -> None:
    with pytest.raises(ImageError, match=r"file has 2\d{7} bytes for a picture that has \d+ as it is"):
        read_header(make(), LIMIT)


@pytest.mark.parametrize("compression", ["group3", "group4"])
def test_a_fax_of_fine_patterns_is_larger_than_its_pixels(compression: str) -> None:
    board = Image.fromarray(np.indices((3600, 3600)).sum(axis=0) % 2 == 1)
    data = encode(board, "TIFF", compression=compression)
    assert len(data) > 2.5 * 3600 * 3600 / 8
    assert np.array_equal(np.asarray(decode(data, 20_000_000))[..., 0] > 0, np.asarray(board))


def test_a_single_strip_of_no_bytes_has_the_rest_of_the_file() -> None:
    data = encode(NOISE, "TIFF", compression="tiff_lzw", strip_size=1 << 20)
    entry = data.rindex(struct.pack("<HHI", 279, 4, 1))
    unsized = data[: entry + 8] + bytes(4) + data[entry + 12 :]
    assert np.array_equal(np.asarray(decode(unsized, LIMIT)), np.asarray(NOISE))
    strip = data.rindex(struct.pack("<HHI", 273, 4, 1)) + 8
    with pytest.raises(ImageTruncated):
        read_header(unsized[:strip] + struct.pack("<I", len(data) + 1) + unsized[strip + 4 :], LIMIT)


def test_a_narrow_picture_may_be_in_wide_tiles() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 1024, 3), np.uint8)
    tiles = [(322, 3, 1, 1024), (323, 3, 1, 2048), (324, 4, 1, 8), (325, 4, 1, 2048 * 1024 * 3)]
    tags = [tag for tag in hostile.grey_tags(100, 1500) if tag[0] not in {258, 262, 273, 277, 278, 279}]
    bits_at = 8 + 2048 * 1024 * 3
    colours = [(258, 3, 3, bits_at), (262, 3, 1, 2), (277, 3, 1, 3)]
    stored = pixels.tobytes() + bytes(548 * 1024 * 3) + struct.pack("<4H", 8, 8, 8, 0)
    picture = decode(hostile.tiff([*tags, *colours, *tiles], stored), LIMIT)
    assert np.array_equal(np.asarray(picture), pixels[:, :100])


def test_the_first_page_of_a_tiff_and_the_first_picture_of_an_mpo_count() -> None:
    other = Image.new("RGB", (8, 8))
    for file_format in ("TIFF", "MPO"):
        header = read_header(encode(NOISE, file_format, save_all=True, append_images=[other]), LIMIT)
        image = Image.open(io.BytesIO(header.file))
        assert getattr(image, "n_frames", 1) == 1
        assert image.size == (80, 60)


def test_one_frame_is_no_animation() -> None:
    assert decode(hostile.apng(1), LIMIT).size == (64, 64)


@pytest.mark.parametrize("frames", [2, 5])
def test_frames_are_counted(frames: int) -> None:
    more = [rectangle(RED, box=(number, 0, 60, 30)) for number in range(1, frames)]
    for file_format in ("PNG", "WEBP"):
        data = encode(rectangle(), file_format, save_all=True, append_images=more, duration=50)
        with pytest.raises(ImageAnimated, match=f"{frames} frames; send one picture"):
            read_header(data, LIMIT)


def test_a_progressive_jpeg_may_have_as_many_scans_as_anyone_writes() -> None:
    assert decode(hostile.jpeg_scans(80), LIMIT).size == (160, 120)
    assert read_header(hostile.jpeg_scans(80), LIMIT).slow
    assert not read_header(hostile.jpeg_scans(5), LIMIT).slow
    with pytest.raises(ImageError, match="more than 100 scans"):
        read_header(hostile.jpeg_scans(120), LIMIT)


def test_an_end_of_a_jpeg_that_is_in_a_comment_hides_no_scans() -> None:
    data = hostile.jpeg_scans(120)
    first = data.index(b"\xff\xda")
    second = data.index(b"\xff\xda", first + 2)
    comment = b"\xff\xfe\0\x06\xff\xd9\xff\xd9"
    table = data.rindex(b"\xff\xc4", first, second)  # the tables of the second scan
    with pytest.raises(ImageError, match="more than 100 scans"):
        read_header(data[:table] + comment + data[table:], LIMIT)


def test_a_large_progressive_jpeg_may_have_fewer_scans() -> None:
    data = bytearray(hostile.jpeg_scans(60))
    at = data.index(b"\xff\xc2")
    data[at + 5 : at + 9] = struct.pack(">HH", 5000, 5000)
    with pytest.raises(ImageError, match="more than 40 scans"):
        read_header(bytes(data), 50_000_000)


@pytest.mark.parametrize("frame", [0xC3, 0xC5, 0xCB])
def test_kinds_of_jpeg_that_no_decoder_here_reads_are_named(frame: int) -> None:
    data = encode(NOISE, "JPEG").replace(b"\xff\xc0", bytes([0xFF, frame]), 1)
    with pytest.raises(FormatUnsupported, match=f"SOF{frame - 0xC0}"):
        read_header(data, LIMIT)


def test_a_file_that_says_two_sizes_is_refused() -> None:
    """A decoder that believes the second would get memory for the first."""
    data = bytearray(encode(NOISE, "WEBP", lossless=True, exif=exif(1)))
    at = data.index(b"VP8X") + 12
    data[at : at + 3] = (7999).to_bytes(3, "little")
    with pytest.raises(ImageError, match="canvas has 8000x60 pixels, its picture 80x60"):
        read_header(bytes(data), LIMIT)
    jpeg = encode(NOISE, "JPEG")
    begin = jpeg.index(b"\xff\xc0")
    frame = jpeg[begin : begin + 2 + int.from_bytes(jpeg[begin + 2 : begin + 4])]
    with pytest.raises(ImageError, match="two headers"):
        read_header(hostile.jpeg_segments(1, frame), LIMIT)
    with pytest.raises(ImageError, match="two chunks b'IHDR'"):
        read_header(hostile.small_png(hostile.small_png()[8:33]), LIMIT)


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (hostile.png(2**31 - 1, 1, b""), ImageTooLarge, "2147483647x1 exceeds 1000000 pixels"),
        (hostile.png(900, 900, bytes(100)), ImageTruncated, "100 bytes of pixels in a PNG file cannot make 900x900"),
        (hostile.small_png()[:-12], ImageTruncated, "PNG file ends"),
        (hostile.png(0, 5, bytes(100)), ImageError, "0x5: a picture without pixels"),
        (hostile.bmp(900, 900), ImageTruncated, "cannot have 900x900 pixels of 24 bits"),
        (hostile.bmp(9, 9, 24, 5, 0, bytes(999)), FormatUnsupported, "BMP with a PNG inside is not supported"),
        (hostile.bmp(9, 9, 7, 0, 0, bytes(999)), ImageError, "a pixel has 7 bits"),
        (hostile.grey_tiff(compression=34712), FormatUnsupported, "compression JPEG 2000 is not supported"),
        (hostile.grey_tiff((256, 4, 1, 0)), ImageError, "0x64 pixels"),
        (hostile.grey_tiff(less=(273,)), ImageError, "does not say where its pixels are"),
        (hostile.grey_tiff((273, 4, 1, 10**9)), ImageTruncated, "ends before its picture"),
        (hostile.grey_tiff((256, 12, 1, 8)), ImageError, "values of type 12"),
        (
            hostile.grey_tiff(
                *((256, 4, 1, 999), (257, 4, 1, 999), (322, 4, 1, 1), (323, 4, 1, 1), (324, 4, 999 * 999, 8)),
                less=(273, 278, 279),
            ),
            ImageError,
            "is in 998001 strips or tiles; 100000 may be",
        ),
        (b"RIFF\x04\0\0\0WEBP", ImageTruncated, "no picture"),
        (b"\xff\xd8\xff\xd9", ImageTruncated, "ends before its picture begins"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, kind: type[ImageError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        read_header(data, LIMIT)
    assert type(caught.value) is kind


def test_exif_data_that_make_no_sense_have_no_orientation() -> None:
    for exif_data in (hostile.exif_of(1), hostile.exif_of(5000)[:5000], b"Exif\0\0", b"Exif\0\0nonsense"):
        assert read_header(hostile.small_png(hostile.chunk(b"eXIf", exif_data[6:])), LIMIT).orientation == 1
        assert read_header(hostile.jpeg_segments(2, hostile.app1(exif_data)), LIMIT).orientation == 1


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (lambda: hostile.small_png(hostile.chunk(b"eXIf", hostile.exif_of(5000)[6:])), "5000 tags"),
        (lambda: hostile.jpeg_segments(1, hostile.app1(hostile.exif_of(5000))), "5000 tags"),
        (lambda: hostile.jpeg_segments(11, hostile.app1(b"Exif\0\0")), "more than 10 segments"),
        (lambda: hostile.small_png(*[hostile.chunk(b"abCd", b"")] * 1001), "more than 1000 chunks"),
        (lambda: hostile.png_texts(b"zTXt", 100), "more than 16777216 bytes"),
        (lambda: hostile.png_texts(b"iTXt", 1000), "more than 16777216 bytes"),
        (lambda: hostile.png_texts(b"iCCP", 1), "more than 16777216 bytes"),
        (lambda: hostile.small_png(*[hostile.chunk(b"zTXt", bytes(2 << 20))] * 3), "6291450 bytes, and 4194304 may"),
        (lambda: hostile.small_png(hostile.chunk(b"iTXt", b"k\0\1\0\0\0" + bytes(5 << 20))), "5242880 bytes"),
        (hostile.tiff_loop, "in a circle"),
        (lambda: hostile.tiff_of_directories(1001), "more than 1000 pages"),
        (hostile.tiff_many_strips, "500000 strips"),
    ],
)
def test_bombs_beside_the_picture_are_refused(data: Callable[[], bytes], named: str) -> None:
    with pytest.raises(ImageError, match=named):
        read_header(data(), LIMIT)


def test_much_beside_the_picture_is_no_bomb() -> None:
    long_text = b"k\0\0" + zlib.compress(bytes(15 << 20))
    international = b"k\0\1\0de\0K\0" + zlib.compress(bytes(1000))
    noise = np.random.default_rng(0).bytes(1 << 20)
    profile = b"k\0\0" + zlib.compress(noise)
    junk = b"k\0\0" + noise
    for chunks in (
        [hostile.chunk(b"zTXt", long_text), hostile.chunk(b"iTXt", international)],
        [hostile.chunk(b"iCCP", profile), hostile.chunk(b"zTXt", junk), hostile.chunk(b"iTXt", b"k\0\0\0\0\0" + noise)],
        [
            hostile.chunk(b"iTXt", b"k\0\0\0\0\0" + bytes(9 << 20)),
            hostile.chunk(b"iTXt", b"k"),
            hostile.chunk(b"zTXt", b""),
        ],
        [hostile.chunk(b"abCd", bytes(5000))] * 900,
    ):
        assert decode(hostile.small_png(*chunks), LIMIT).size == (64, 64)


def test_of_a_tiff_with_pages_the_first_is_read() -> None:
    pages = hostile.tiff_of_directories(1000)
    assert decode(pages, LIMIT).size == (64, 64)
    assert decode(pages[:-4] + b"\xff\xff\xff\xff", LIMIT).size == (64, 64), "what is no page ends them"
    several = encode(NOISE, "TIFF", save_all=True, append_images=[rectangle()], big_tiff=True)
    assert decode(several, LIMIT).size == (80, 60)
    large = encode(NOISE, "TIFF", big_tiff=True)
    (start,) = struct.unpack_from("<Q", large, 8)
    end = start + 8 + 20 * struct.unpack_from("<Q", large, start)[0]
    for following in (2**64 - 1, 2**63, len(large)):
        assert decode(large[:end] + struct.pack("<Q", following) + large[end + 8 :], LIMIT).size == (80, 60)


@pytest.mark.parametrize(
    ("kind", "most_bytes_a_pixel"),
    [
        ("webp lossless", 14.0),  # 16.8 as Pillow loads it, and 24.8 with transparency
        ("png grey 16", 12.0),  # 28 when scaled in one go
        ("png transparent", 11.0),  # 16
        ("jpeg progressive", 11.0),
    ],
)
def test_the_memory_of_a_large_picture_is_what_its_header_says(
    kind: str, most_bytes_a_pixel: float, tmp_path: Path
) -> None:
    """Measured in a process of its own, as the peak over what there was before."""
    side = 3000
    code = f"""
import io, re, sys
import numpy as np
from PIL import Image
from server.decode import decode_pixels, prepare_decoding
from server.headers import read_header

def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

data = open({str(tmp_path / "file")!r}, "rb").read()
prepare_decoding(1)
decode_pixels(read_header(data[:0] + open({str(tmp_path / "small")!r}, "rb").read(), 10**8))
before = memory("VmRSS")
header = read_header(data, 10**8)
pixels = decode_pixels(header)
print((memory("VmHWM") - before) / {side * side}, header.peak_bytes / {side * side})
"""
    for name, size in (("file", side), ("small", 16)):
        base = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)).resize((size, size))
        grey = Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
        alpha = base.convert("RGBA")
        alpha.putalpha(128)
        (tmp_path / name).write_bytes(
            {
                "webp lossless": lambda base=base: encode(base, "WEBP", lossless=True, method=0, quality=0),
                "png grey 16": lambda grey=grey: encode(grey, compress_level=1),
                "png transparent": lambda alpha=alpha: encode(alpha, compress_level=1),
                "jpeg progressive": lambda base=base: encode(base, "JPEG", progressive=True),
            }[kind]()
        )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    measured, said = map(float, done.stdout.split())
    assert measured < most_bytes_a_pixel
    assert measured < 1.1 * said + 4.0  # what does not grow with the picture: blocks of 16 MB, bands
