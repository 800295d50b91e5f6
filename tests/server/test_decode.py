import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base

from server.decode import decode, decode_picture, decode_pixels, drop_kept_memory, prepare_decoding
from server.errors import (
    FormatUnsupported,
    ImageAnimated,
    ImageEmpty,
    ImageError,
    ImageTooLarge,
    ImageTruncated,
)
from server.headers import read_header
from tests.server.fake_engine import box_of_bright
from tests.server.pictures import BOX, GREEN, HEIGHT, WHITE, WIDTH, encode, rectangle

LIMIT = 1_000_000
LOSSY_LEVELS = 12  # measured up to 9 away from edges at quality 95

# How a picture is stored so that a viewer which heeds the EXIF orientation shows it upright.
STORED_FOR = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def palette_picture(transparent_background: bool) -> bytes:
    indices = np.zeros((HEIGHT, WIDTH), np.uint8)
    indices[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 1
    image = Image.fromarray(indices)
    image.putpalette([0, 0, 0, 255, 255, 255])
    return encode(image, transparency=0) if transparent_background else encode(image)


def grey16(file_format: str) -> bytes:
    values = np.full((HEIGHT, WIDTH), 257 * 20, np.uint16)
    values[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 257 * 200
    return encode(Image.fromarray(values), file_format)


def png_of(header: bytes, rows: bytes) -> bytes:
    """A PNG from the content of its IHDR and its filtered rows: for what Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header says any size; its few bytes of pixels do not matter."""
    return png_of(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), bytes(1000))


def png16(color_type: int, channels: int) -> bytes:
    """The white rectangle on black with 16 bits a channel; where there is an alpha channel it is opaque."""
    pixels = np.zeros((HEIGHT, WIDTH, channels), ">u2")
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 65535
    if color_type in {4, 6}:
        pixels[..., -1] = 65535
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return png_of(struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, color_type, 0, 0, 0), rows)


def tiff16() -> bytes:
    """An uncompressed RGB TIFF with 16 bits a channel."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), "<u2")
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 65535
    tags = [
        (256, 3, 1, WIDTH),
        (257, 3, 1, HEIGHT),
        (258, 3, 3, 8),  # bits a sample: three values, at offset 8
        (259, 3, 1, 1),  # no compression
        (262, 3, 1, 2),  # RGB
        (273, 4, 1, 14),  # the pixels, at offset 14
        (277, 3, 1, 3),
        (278, 3, 1, HEIGHT),
        (279, 4, 1, pixels.nbytes),
    ]
    content = struct.pack("<3H", 16, 16, 16) + pixels.tobytes()
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + directory


def kinds() -> dict[str, bytes]:
    upright = rectangle()
    return {
        "jpeg": encode(upright, "JPEG", quality=95),
        "jpeg progressive": encode(upright, "JPEG", quality=95, progressive=True),
        "jpeg grey": encode(upright.convert("L"), "JPEG", quality=95),
        "jpeg cmyk": encode(upright.convert("CMYK"), "JPEG", quality=95),
        "png": encode(upright),
        "png interlaced grey": encode(upright.convert("L")),
        "png bilevel": encode(upright.convert("1")),
        "png palette": palette_picture(transparent_background=False),
        "png alpha": encode(upright.convert("RGBA")),
        "png grey alpha": encode(upright.convert("LA")),
        "png 16 bits grey": png16(0, 1),
        "png 16 bits rgb": png16(2, 3),
        "png 16 bits grey alpha": png16(4, 2),
        "png 16 bits rgba": png16(6, 4),
        "webp lossless": encode(upright, "WEBP", lossless=True),
        "webp alpha": encode(upright.convert("RGBA"), "WEBP", lossless=True),
        "bmp": encode(upright, "BMP"),
        "bmp palette": encode(upright.convert("P"), "BMP"),
        "tiff": encode(upright, "TIFF"),
        "tiff lzw": encode(upright, "TIFF", compression="tiff_lzw"),
        "tiff 16 bits rgb": tiff16(),
        "tiff cmyk": encode(upright.convert("CMYK"), "TIFF"),
        "tiff two pages": encode(upright, "TIFF", save_all=True, append_images=[Image.new("RGB", (5, 5))]),
        "mpo": encode(upright, "MPO", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))], quality=95),
    }


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_file_shows_the_same_rectangle(kind: str) -> None:
    picture = decode(kinds()[kind], LIMIT)
    assert picture.mode == "RGB"
    assert picture.size == (WIDTH, HEIGHT)
    pixels = np.asarray(picture)
    for channel in range(3):
        assert tuple(box_of_bright(pixels[..., channel])) == BOX
    inside = pixels[BOX[1] + 4 : BOX[3] - 4, BOX[0] + 4 : BOX[2] - 4].astype(int)
    assert inside.min() >= 255 - LOSSY_LEVELS
    assert pixels[40:, :].max() <= LOSSY_LEVELS


@pytest.mark.parametrize("orientation", STORED_FOR)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_the_displayed_one(orientation: int, file_format: str) -> None:
    stored = rectangle()
    method = STORED_FOR[orientation]
    if method is not None:
        stored = stored.transpose(method)
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    picture = decode(encode(stored, file_format, exif=exif, **options), LIMIT)
    assert picture.size == (WIDTH, HEIGHT)
    assert tuple(box_of_bright(np.asarray(picture)[..., 0])) == BOX


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientations_that_mean_nothing_are_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[Base.Orientation] = value
    assert decode(encode(rectangle(), "JPEG", exif=exif), LIMIT).size == (WIDTH, HEIGHT)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_cost_the_picture() -> None:
    data = encode(rectangle(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff\xff")
    assert decode(data, LIMIT).size == (WIDTH, HEIGHT)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    for file_format in ("PNG", "TIFF"):
        pixels = np.asarray(decode(grey16(file_format), LIMIT))
        assert (pixels[BOX[1], BOX[0]] == 200).all()
        assert (pixels[0, 0] == 20).all()


@pytest.mark.parametrize(
    ("dtype", "white"), [(np.float32, 1.0), (np.float32, 255.0), (np.int32, 65535), (np.uint8, 255)]
)
def test_wide_grey_tiffs_are_scaled_to_their_range(dtype: type, white: float) -> None:
    values = np.zeros((HEIGHT, WIDTH), dtype)
    values[BOX[1] : BOX[3], BOX[0] : BOX[2]] = white
    pixels = np.asarray(decode(encode(Image.fromarray(values), "TIFF"), LIMIT))
    assert (pixels[BOX[1], BOX[0]] == 255).all()
    assert (pixels[0, 0] == 0).all()


def test_transparency_shows_white() -> None:
    layer = rectangle(GREEN).convert("RGBA")
    layer.putalpha(rectangle(WHITE).convert("L"))  # only the rectangle is opaque
    for data in (encode(layer), encode(layer, "WEBP", lossless=True)):
        pixels = np.asarray(decode(data, LIMIT))
        assert tuple(pixels[0, 0]) == WHITE
        assert tuple(pixels[BOX[1], BOX[0]]) == GREEN


def test_transparent_palette_entry_shows_white() -> None:
    pixels = np.asarray(decode(palette_picture(transparent_background=True), LIMIT))
    assert tuple(pixels[0, 0]) == WHITE


def test_transparent_colour_of_an_rgb_png_shows_white() -> None:
    pixels = np.asarray(decode(encode(rectangle(GREEN), transparency=(0, 0, 0)), LIMIT))
    assert tuple(pixels[0, 0]) == WHITE
    assert tuple(pixels[BOX[1], BOX[0]]) == GREEN


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_files_are_an_error(file_format: str, kept: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8))
    data = encode(noise, file_format)
    with pytest.raises(ImageError) as caught:
        decode(data[: int(len(data) * kept)], LIMIT)
    assert caught.value.status == 422
    if file_format in {"JPEG", "PNG"}:
        assert isinstance(caught.value, ImageTruncated)


def test_nothing_is_an_error() -> None:
    with pytest.raises(ImageEmpty):
        decode(b"", LIMIT)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encode(rectangle(), "GIF"), "GIF"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"8BPS\0\1", "PSD"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<?xml version='1.0'?>\n<!-- made by hand -->\n<svg/>", "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (encode(rectangle(), "AVIF"), "AVIF"),
        (encode(rectangle(), "ICO"), "ICO"),
    ],
)
def test_other_formats_are_called_by_their_name(data: bytes, name: str) -> None:
    with pytest.raises(FormatUnsupported, match=f"{name} is not supported; send JPEG, PNG, WebP, BMP or TIFF"):
        decode(data, LIMIT)


@pytest.mark.parametrize("data", [b"hello", b"\0" * 100, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0"])
def test_what_is_no_picture_is_an_error(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode(data, LIMIT)
    assert caught.value.status == 422


def test_pixel_limit_is_checked_on_the_header() -> None:
    with pytest.raises(ImageTooLarge, match="1001x1000 exceeds 1000000 pixels"):
        decode(png_claiming(1001, 1000), LIMIT)
    decode(encode(Image.new("L", (1000, 1000)), "PNG"), LIMIT)


@pytest.mark.parametrize("size", [(1, 65_536), (65_536, 1)])
def test_sides_have_a_limit_too(size: tuple[int, int]) -> None:
    with pytest.raises(ImageTooLarge, match="a side exceeds 65535 px"):
        decode(png_claiming(*size), LIMIT)


def test_bombs_are_refused_by_their_size() -> None:
    with pytest.raises(ImageTooLarge, match="19000x19000 exceeds 1000000 pixels"):
        decode(png_claiming(19000, 19000), LIMIT)
    with pytest.raises(ImageTooLarge):
        decode(png_claiming(10000, 10000), LIMIT)


def test_animations_are_refused() -> None:
    frames = [rectangle(GREEN), rectangle(WHITE)]
    for file_format in ("PNG", "WEBP"):
        data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], duration=100)
        with pytest.raises(ImageAnimated, match="2 frames"):
            decode(data, LIMIT)


def test_pixels_are_those_of_pillow() -> None:
    data = encode(Image.fromarray(np.random.default_rng(1).integers(0, 255, (50, 70, 3), np.uint8)), "JPEG")
    assert np.array_equal(np.asarray(decode(data, LIMIT)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def noisy_jpeg(mode: str = "RGB", orientation: int = 1, size: tuple[int, int] = (61, 38), **options: object) -> bytes:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.fromarray(values).convert(mode), "JPEG", exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_of_a_jpeg_are_those_of_its_picture_however_it_is_turned(orientation: int) -> None:
    header = read_header(noisy_jpeg(orientation=orientation), LIMIT)
    assert header.orientation == orientation
    assert np.array_equal(decode_pixels(header), np.asarray(decode_picture(header)))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 5}, {"restart_marker_rows": 1}],
)
def test_pixels_of_a_jpeg_are_those_of_its_picture_of_any_kind(mode: str, options: dict[str, object]) -> None:
    header = read_header(noisy_jpeg(mode, **options), LIMIT)
    pixels = decode_pixels(header)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.asarray(decode_picture(header)))


def test_a_jpeg_with_broken_data_gets_what_pillow_makes_of_it() -> None:
    data = bytearray(noisy_jpeg(size=(200, 160), quality=90))
    middle = len(data) // 2
    data[middle : middle + 40] = b"\x55" * 40
    header = read_header(bytes(data), LIMIT)
    assert np.array_equal(decode_pixels(header), np.asarray(decode_picture(header)))


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_pixels_of_every_kind_are_those_of_the_picture(kind: str) -> None:
    header = read_header(kinds()[kind], LIMIT)
    assert np.array_equal(decode_pixels(header), np.asarray(decode_picture(header)))


def test_memory_kept_of_pictures_can_be_let_go() -> None:
    prepare_decoding(2)
    decode(encode(rectangle(), "PNG"), LIMIT)
    assert Image.core.get_stats()["blocks_cached"] > 0  # type: ignore[attr-defined]
    drop_kept_memory()
    assert Image.core.get_stats()["blocks_cached"] == 0  # type: ignore[attr-defined]
