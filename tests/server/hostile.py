"""What is sent to a server by those who mean it no good, and by those who do not know better. All made in code."""

import base64
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image

from server.settings import Settings
from tests.server.pictures import GREEN, RED, WHITE, encode, rectangle

BOUNDARY = "frontier"
_FORM = f"multipart/form-data; boundary={BOUNDARY}"
_JSON = "application/json"

MAX_BODY_BYTES: int = Settings.model_fields["max_body_bytes"].default
FULL_BYTES = MAX_BODY_BYTES - 4096
"""Of a file in a body that is as large as may be."""

_SIDE = 6928  # of 48 megapixels


@dataclass(frozen=True)
class Attack:
    """A request that should not do harm: what is sent, and what it must be answered."""

    name: str
    status: int
    code: str  # of the error; empty for an answer with boxes
    body: Callable[[], bytes] = bytes
    content_type: str = "image/*"
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    wire: Callable[[], Iterator[bytes]] | None = None  # all that is sent, where it is not a request with a body

    def pieces(self) -> Iterator[bytes]:
        """What goes over the wire, piece by piece; made now as far as it has an end."""
        if self.wire is not None:
            return self.wire()
        body = self.body()
        return iter([head(self.content_type, self.query, {"Content-Length": str(len(body)), **self.headers}), body])


def head(content_type: str, query: str = "", headers: dict[str, str] | None = None) -> bytes:
    lines = [f"POST /detect{'?' if query else ''}{query} HTTP/1.1", "Host: test", f"Content-Type: {content_type}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


# --- pictures ---------------------------------------------------------------------------------------------------------


def noise(width: int = 1200, height: int = 900) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int, height: int, pixels: bytes, *more: bytes, bits: int = 8, color: int = 2, interlaced: int = 0
) -> bytes:
    """A PNG with any header, `more` chunks before its pixels, and `pixels` compressed already."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def small_png(*more: bytes) -> bytes:
    return png(64, 64, zlib.compress(bytes(64 * (1 + 3 * 64))), *more)


def zeros(count: int) -> bytes:
    """`count` zeros, compressed, without ever having them all."""
    packer = zlib.compressobj(9)
    pieces = [packer.compress(bytes(min(1 << 20, count - at))) for at in range(0, count, 1 << 20)]
    return b"".join(pieces) + packer.flush()


def png_19000() -> bytes:
    """361 megapixels of one bit in 44 KB: every byte of it is right."""
    return png(19000, 19000, zeros(19000 * (1 + 19000 // 8)), bits=1, color=0)


def png_texts(kind: bytes, count: int) -> bytes:
    """A good picture with `count` texts that would take a gigabyte, or one profile that would take a tenth of that."""
    packed = zeros((1 << 30) // max(10, count))
    before = {b"zTXt": b"k%d\0\0", b"iTXt": b"k%d\0\1\0\0\0", b"iCCP": b"k%d\0\0"}[kind]
    return small_png(*(chunk(kind, before % number + packed) for number in range(count)))


def apng(frames: int) -> bytes:
    return small_png(chunk(b"acTL", struct.pack(">II", frames, 0)))


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encode(rectangle(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes over and over."""
    data = encode(noise(160, 120), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + (data[last:-2]) * scans + b"\xff\xd9"


def jpeg_segments(count: int, segment: bytes) -> bytes:
    data = encode(rectangle(), "JPEG")
    return data[:2] + segment * count + data[2:]


def exif_of(tags: int) -> bytes:
    """EXIF data with as many tags as are asked for, all pointing at the same 4 KB."""
    entries = b"".join(struct.pack("<HHII", tag, 7, 4096, 8) for tag in range(tags))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, tags) + entries + bytes(4)


def app1(content: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", 2 + len(content)) + content


def webp_canvas(width: int, height: int) -> bytes:
    """A small picture that says that its canvas is of another size."""
    inner = encode(rectangle(), "WEBP", lossless=True)[12:]
    canvas = (
        b"VP8X" + struct.pack("<II", 10, 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", 4 + len(canvas) + len(inner)) + b"WEBP" + canvas + inner


def animated_webp() -> bytes:
    return encode(rectangle(GREEN), "WEBP", save_all=True, append_images=[rectangle(WHITE)], duration=100)


def bmp(width: int, height: int, bits: int = 24, compression: int = 0, colors: int = 0, data: bytes = b"") -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, colors, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54) + header + data


def tiff(tags: list[tuple[int, int, int, int]], data: bytes = bytes(64 * 64), following: int = 0) -> bytes:
    """A TIFF of (tag, type, count, value or offset), its data at 8 and its directory behind it."""
    at = 8 + len(data)
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return (
        b"II*\0" + struct.pack("<I", at) + data + struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)
    )


def grey_tags(width: int = 64, height: int = 64, compression: int = 1) -> list[tuple[int, int, int, int]]:
    return [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, compression),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 4, 1, 64 * 64),
    ]


def grey_tiff(*changed: tuple[int, int, int, int], compression: int = 1, less: tuple[int, ...] = ()) -> bytes:
    """A grey TIFF of 64x64 with other values for some tags, and `less` tags."""
    tags = {tag[0]: tag for tag in (*grey_tags(compression=compression), *changed)}
    return tiff([tag for number, tag in tags.items() if number not in less])


def tiff_many_strips() -> bytes:
    """Half a million strips where there is room for one; each would be an object of the interpreter."""
    count = 500_000
    offsets = struct.pack("<I", 8) * count
    tags = [tag for tag in grey_tags() if tag[0] != 273]
    return tiff([*tags, (273, 4, count, 8 + 4096)], bytes(4096) + offsets)


def tiff_tiles() -> bytes:
    tiles = ((322, 4, 1, 65536), (323, 4, 1, 65536), (324, 4, 1, 8), (325, 4, 1, 4096))
    return grey_tiff(*tiles, less=(273, 278, 279))


def tiff_loop() -> bytes:
    """A directory whose next one is itself."""
    return tiff(grey_tags(), following=8 + 64 * 64)


def tiff_of_directories(count: int) -> bytes:
    """One small picture's directory again and again, each the next of the one before."""
    data, tags = bytes(64 * 64), grey_tags()
    size = 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    begin = 8 + len(data)
    directories = b"".join(
        struct.pack("<H", len(tags))
        + entries
        + struct.pack("<I", begin + (number + 1) * size if number < count - 1 else 0)
        for number in range(count)
    )
    return b"II*\0" + struct.pack("<I", begin) + data + directories


def bigtiff_of_tags(tags: int) -> bytes:
    return b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, tags)


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + b"\x2c" + bytes(9) + b"\x02\0;"


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


# --- halves of pictures of 48 megapixels, as large as a body may be ---------------------------------------------------


@cache
def noise_bytes() -> bytes:
    return np.random.default_rng(0).bytes(FULL_BYTES)


def full(begin: bytes) -> bytes:
    """`begin`, and then anything."""
    return begin + noise_bytes()[len(begin) :]


def jpeg_begin(*, progressive: bool = False) -> bytes:
    """Up to where the pixels are."""
    data = bytearray(encode(rectangle(), "JPEG", progressive=progressive))
    at = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", _SIDE, _SIDE)
    at = data.index(b"\xff\xda") + 2
    return bytes(data[: at + int.from_bytes(data[at : at + 2])])


def half_jpeg(*, progressive: bool = False) -> bytes:
    return full(jpeg_begin(progressive=progressive)).replace(b"\xff\xd9", b"\xff\0")


def half_png() -> bytes:
    return full(png(_SIDE, _SIDE, b"")[:33] + struct.pack(">I", 2 * FULL_BYTES) + b"IDAT")


def half_webp() -> bytes:
    frame = b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", _SIDE, _SIDE)
    sizes = struct.pack("<I", 2 * FULL_BYTES + 12), struct.pack("<I", 2 * FULL_BYTES)
    return full(b"RIFF" + sizes[0] + b"WEBPVP8 " + sizes[1] + frame)


def half_bmp() -> bytes:
    return full(bmp(_SIDE, _SIDE, bits=8))


def half_tiff(*changed: tuple[int, int, int, int], compression: int = 1, less: tuple[int, ...] = ()) -> bytes:
    """Its directory is before its pixels."""
    tags = {tag[0]: tag for tag in (*grey_tags(_SIDE, _SIDE, compression), (279, 4, 1, _SIDE**2), *changed)}
    kept = sorted(tag for number, tag in tags.items() if number not in less)
    entries = b"".join(struct.pack("<HHII", *tag) for tag in kept)
    return full(b"II*\0" + struct.pack("<IH", 8, len(kept)) + entries + bytes(4))


def much_in_png() -> bytes:
    """The text makes for a copy without it."""
    return png(64, 64, noise_bytes()[:-200], chunk(b"tEXt", b"a\0b"))


def much_in_webp() -> bytes:
    frame = b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 64, 64)
    return full(b"RIFF" + struct.pack("<I", FULL_BYTES - 8) + b"WEBPVP8 " + struct.pack("<I", FULL_BYTES - 20) + frame)


def much_in_tiff() -> bytes:
    return half_tiff((256, 4, 1, 64), (257, 4, 1, 64), (273, 4, 1, 256), (279, 4, 1, FULL_BYTES - 256), compression=5)


def much_in_jpeg() -> bytes:
    data = encode(rectangle(), "JPEG", comment=b"makes for a copy without it")
    return data[:-2] + noise_bytes()[len(data) :].replace(b"\xff", b"\xfe") + b"\xff\xd9"


def half_tiled_tiff() -> bytes:
    tile = ((322, 4, 1, _SIDE), (323, 4, 1, _SIDE), (324, 4, 1, 4096), (325, 4, 1, _SIDE**2))
    return half_tiff(*tile, less=(273, 278, 279))


def tiff_of_tiles_of_one_pixel() -> bytes:
    """Five million places, each of them right; each would be an object of the interpreter."""
    tiles = ((322, 4, 1, 1), (323, 4, 1, 1), (324, 4, 2500 * 2000, 4096))
    return half_tiff((256, 4, 1, 2500), (257, 4, 1, 2000), *tiles, less=(273, 278, 279))


# --- bodies -----------------------------------------------------------------------------------------------------------


def part(content: bytes, name: str = "images", more_headers: bytes = b"") -> bytes:
    disposition = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="x.png"\r\n'.encode()
    return disposition + more_headers + b"\r\n" + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def in_json(text: bytes) -> bytes:
    return b'{"images": [{"b64": "' + text + b'"}]}'


# --- the wire ---------------------------------------------------------------------------------------------------------


def endless_chunks() -> Iterator[bytes]:
    yield head("image/png", headers={"Transfer-Encoding": "chunked"})
    piece = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    while True:
        yield piece


def endless_jpeg() -> Iterator[bytes]:
    begin = jpeg_begin()
    yield head("image/jpeg", headers={"Transfer-Encoding": "chunked"}) + b"%x\r\n%b\r\n" % (len(begin), begin)
    while True:
        yield b"10000\r\n" + noise_bytes()[:0x10000] + b"\r\n"


def endless_chunk_header() -> Iterator[bytes]:
    yield head("image/png", headers={"Transfer-Encoding": "chunked"}) + b"1;"
    while True:
        yield b"x" * 65536


def endless_headers() -> Iterator[bytes]:
    yield head("image/png")[:-2]
    for number in range(10_000_000):
        yield b"".join(b"X-%d-%d: %s\r\n" % (number, at, b"y" * 100) for at in range(500))


def endless_header() -> Iterator[bytes]:
    yield head("image/png")[:-2] + b"X-Endless: "
    while True:
        yield b"y" * 65536


def endless_trailers() -> Iterator[bytes]:
    yield head("image/png", headers={"Transfer-Encoding": "chunked"}) + b"0\r\n"
    while True:
        yield b"".join(b"X-%d: %s\r\n" % (at, b"y" * 100) for at in range(500))


def endless_trailer() -> Iterator[bytes]:
    yield head("image/png", headers={"Transfer-Encoding": "chunked"}) + b"0\r\nX-Endless: "
    while True:
        yield b"y" * 65536


def endless_path() -> Iterator[bytes]:
    yield b"POST /detect?classes="
    while True:
        yield b"y" * 65536


def slow_body() -> Iterator[bytes]:
    yield head("image/png", headers={"Content-Length": "100000"})
    while True:
        time.sleep(0.05)
        yield b"\x89"


def lying_length() -> Iterator[bytes]:
    yield head("image/png", headers={"Content-Length": str(10**12)})


def lying_length_behind_zeros() -> Iterator[bytes]:
    yield head("image/png", headers={"Content-Length": "0" * 5000 + str(10**12)})


def large_headers() -> Iterator[bytes]:
    yield head("image/png", headers={"Content-Length": "0", "X-Large": "a" * 70_000})


def bad_chunks() -> Iterator[bytes]:
    yield head("image/png", headers={"Transfer-Encoding": "chunked"}) + b"zz\r\nxx\r\n"


ATTACKS = (
    # what is no picture, or not the one it is said to be
    Attack("nothing at all", 422, "image_empty"),
    Attack("a text sent as image/png", 422, "image_unreadable", lambda: b"Dear server,\n" * 1000, "image/png"),
    Attack("zeros", 422, "image_unreadable", lambda: bytes(1 << 20)),
    Attack("a PNG sent as image/jpeg", 415, "image_mislabelled", small_png, "image/jpeg"),
    Attack("a text as text/plain", 415, "unsupported_media_type", lambda: b"hello", "text/plain"),
    Attack("a GIF", 415, "unsupported_format", lambda: encode(rectangle(RED), "GIF")),
    Attack("a GIF of 65535x65535", 415, "unsupported_format", lambda: gif(65535, 65535)),
    Attack("a PDF", 415, "unsupported_format", lambda: b"%PDF-1.7\n" + bytes(1000)),
    Attack("an SVG that asks for itself", 415, "unsupported_format", lambda: b"<svg><use href='#a'/></svg>"),
    # cut
    Attack("a JPEG cut at two thirds", 422, "image_truncated", lambda: cut(encode(noise(), "JPEG"))),
    Attack("a progressive JPEG, cut", 422, "image_truncated", lambda: cut(encode(noise(), "JPEG", progressive=True))),
    Attack("a PNG, cut", 422, "image_truncated", lambda: cut(encode(noise(), "PNG", compress_level=1))),
    Attack("a WebP, cut", 422, "image_truncated", lambda: cut(encode(noise(), "WEBP", method=0))),
    Attack("a BMP, cut", 422, "image_truncated", lambda: cut(encode(noise(), "BMP"))),
    Attack("a TIFF, cut", 422, "image_truncated", lambda: cut(encode(noise(), "TIFF"))),
    Attack("a TIFF in LZW, cut", 422, "image_truncated", lambda: cut(encode(noise(), "TIFF", compression="tiff_lzw"))),
    # animated
    Attack("an APNG of 2 frames", 422, "image_animated", lambda: apng(2)),
    Attack("an APNG of 2^31 - 1 frames", 422, "image_animated", lambda: apng(2**31 - 1)),
    Attack("an animated WebP", 422, "image_animated", animated_webp),
    # bombs by size
    Attack("a PNG of 19000x19000 in 44 KB", 413, "too_many_pixels", png_19000),
    Attack("a PNG of 2^31 - 1 squared", 413, "too_many_pixels", lambda: png(2**31 - 1, 2**31 - 1, b"")),
    Attack("a PNG of 1x40000000", 413, "too_many_pixels", lambda: png(1, 40_000_000, b"")),
    Attack("a PNG of 7000x7000 without pixels", 422, "image_truncated", lambda: png(7000, 7000, bytes(1000))),
    Attack("an interlaced one", 422, "image_truncated", lambda: png(7000, 7000, bytes(1000), interlaced=1)),
    Attack("a JPEG of 65535x65535", 413, "too_many_pixels", lambda: jpeg_claiming(65535, 65535)),
    Attack("a WebP with a canvas of 2^24 squared", 413, "too_many_pixels", lambda: webp_canvas(1 << 24, 1 << 24)),
    Attack("a WebP whose canvas is not its picture's", 422, "image_unreadable", lambda: webp_canvas(7000, 7000)),
    Attack("a BMP of 2^31 - 1 squared", 413, "too_many_pixels", lambda: bmp(2**31 - 1, 2**31 - 1)),
    Attack("a BMP of 7000x7000 in 54 bytes", 422, "image_truncated", lambda: bmp(7000, 7000)),
    Attack("a TIFF of 60000x60000", 413, "too_many_pixels", lambda: tiff(grey_tags(60000, 60000))),
    Attack("a TIFF of 7000x7000 in 4 KB", 422, "image_truncated", lambda: tiff(grey_tags(7000, 7000))),
    # bombs within a file; what has nothing to do with pixels is never read, and the picture gets its boxes
    Attack("a PNG with a gigabyte of zTXt", 422, "image_unreadable", lambda: png_texts(b"zTXt", 100)),
    Attack("a PNG with a gigabyte of iTXt", 422, "image_unreadable", lambda: png_texts(b"iTXt", 1000)),
    Attack("a PNG with 100 MB of profile", 422, "image_unreadable", lambda: png_texts(b"iCCP", 1)),
    Attack(
        "a PNG with 10 MB of private chunks",
        422,
        "image_unreadable",
        lambda: small_png(*[chunk(b"abCd", bytes(1000))] * 10_000),
    ),
    Attack("a PNG of 400,000 empty chunks", 422, "image_unreadable", lambda: small_png(chunk(b"IDAT", b"") * 400_000)),
    Attack("a PNG with two headers", 422, "image_unreadable", lambda: small_png(small_png()[8:33])),
    Attack("a PNG with a palette of 3 MB", 422, "image_unreadable", lambda: small_png(chunk(b"PLTE", bytes(3 << 20)))),
    Attack("a JPEG of 5000 scans", 422, "image_unreadable", lambda: jpeg_scans(5000)),
    Attack("a JPEG with 200,000 comments", 422, "image_unreadable", lambda: jpeg_segments(200_000, b"\xff\xfe\0\2")),
    Attack("a JPEG with 5 MB of padding", 422, "image_unreadable", lambda: jpeg_segments(5 << 20, b"\xff")),
    Attack(
        "a JPEG with 150 times 64 KB of EXIF",
        422,
        "image_unreadable",
        lambda: jpeg_segments(150, app1(b"Exif\0\0" + bytes(65527))),
    ),
    Attack("a JPEG with an EXIF bomb", 422, "image_unreadable", lambda: jpeg_segments(1, app1(exif_of(5000)))),
    Attack("a PNG with an EXIF bomb", 422, "image_unreadable", lambda: small_png(chunk(b"eXIf", exif_of(65535)[6:]))),
    Attack(
        "a JPEG with two frames", 422, "image_unreadable", lambda: jpeg_segments(1, encode(rectangle(), "JPEG")[2:-2])
    ),
    Attack("a BMP in run lengths", 415, "unsupported_format", lambda: bmp(7000, 7000, 8, 1, 0, bytes(2000))),
    Attack("a BMP with 2^31 colours", 422, "image_unreadable", lambda: bmp(64, 64, 8, 0, 2**31, bytes(9000))),
    Attack("a TIFF whose directory follows itself", 422, "image_unreadable", tiff_loop),
    Attack("a TIFF of 10,000 directories", 422, "image_unreadable", lambda: tiff_of_directories(10_000)),
    Attack("a TIFF of 65,535 tags", 422, "image_unreadable", lambda: tiff([(tag, 3, 1, 0) for tag in range(65535)])),
    Attack("a BigTIFF of 2^60 tags", 422, "image_unreadable", lambda: bigtiff_of_tags(1 << 60)),
    Attack("a TIFF with half a million strips", 422, "image_unreadable", tiff_many_strips),
    Attack(
        "a TIFF with 2^32 - 1 strips of 64 rows",
        422,
        "image_unreadable",
        lambda: grey_tiff((273, 4, 2**32 - 1, 8), less=(279,)),
    ),
    Attack("a TIFF with one strip of 64", 422, "image_truncated", lambda: grey_tiff((278, 4, 1, 1))),
    Attack("a TIFF with 2^32 - 1 bits a sample", 422, "image_unreadable", lambda: grey_tiff((258, 3, 2**32 - 1, 8))),
    Attack("a TIFF with 65,535 samples", 422, "image_unreadable", lambda: grey_tiff((277, 3, 1, 65535))),
    Attack(
        "a TIFF whose strip is its header", 422, "image_unreadable", lambda: grey_tiff((273, 4, 1, 0), compression=8)
    ),
    Attack("a TIFF with tiles of 65536x65536", 422, "image_unreadable", tiff_tiles),
    Attack("a TIFF in LZMA", 415, "unsupported_format", lambda: grey_tiff(compression=34925)),
    Attack("a TIFF of 5 million tiles of one pixel", 422, "image_unreadable", tiff_of_tiles_of_one_pixel),
    # bodies as large as may be: pictures cut in half, and what is no picture
    Attack("half a JPEG of 48 megapixels", 422, "image_truncated", half_jpeg),
    Attack("half a progressive one", 422, "image_truncated", lambda: half_jpeg(progressive=True)),
    Attack("half a PNG of 48 megapixels", 422, "image_truncated", half_png),
    Attack("half a WebP of 48 megapixels", 422, "image_truncated", half_webp),
    Attack("half a BMP of 48 megapixels", 422, "image_truncated", half_bmp),
    Attack("half a TIFF of 48 megapixels", 422, "image_truncated", half_tiff),
    Attack("half a TIFF in LZW", 422, "image_truncated", lambda: half_tiff(compression=5)),
    Attack("half a TIFF in tiles", 422, "image_truncated", half_tiled_tiff),
    Attack(
        "a JPEG without its end, then zeros", 422, "image_truncated", lambda: jpeg_begin() + bytes(FULL_BYTES - 5000)
    ),
    Attack("a PNG of 64x64 in 24 MB", 422, "image_unreadable", much_in_png),
    Attack("a WebP of 64x64 in 24 MB", 422, "image_unreadable", much_in_webp),
    Attack("a TIFF of 64x64 in 24 MB", 422, "image_unreadable", much_in_tiff),
    Attack("a small JPEG in 24 MB", 422, "image_unreadable", much_in_jpeg),
    Attack("zeros, as many as may be", 422, "image_unreadable", lambda: bytes(FULL_BYTES)),
    Attack("a GIF as large as may be", 415, "unsupported_format", lambda: full(b"GIF89a")),
    Attack("one in a form", 415, "unsupported_format", lambda: form(part(full(b"GIF89a"))), _FORM),
    Attack(
        "one in base64",
        415,
        "unsupported_format",
        lambda: in_json(base64.b64encode(full(b"GIF89a")[: FULL_BYTES * 3 // 4])),
        _JSON,
    ),
    Attack("half a JPEG in a form that never ends", 400, "bad_body", lambda: part(half_jpeg()), _FORM),
    Attack(
        "32 halves of JPEGs in a form",
        422,
        "image_truncated",
        lambda: form(part(half_jpeg()[: FULL_BYTES // 32 - 200]) * 32),
        _FORM,
    ),
    Attack(
        "half a JPEG in base64",
        422,
        "image_truncated",
        lambda: in_json(base64.b64encode(half_jpeg()[: FULL_BYTES * 3 // 4])),
        _JSON,
    ),
    Attack(
        "one with a star at its end",
        422,
        "image_unreadable",
        lambda: in_json(base64.b64encode(half_jpeg()[: FULL_BYTES * 3 // 4]) + b"*"),
        _JSON,
    ),
    Attack(
        "JSON that ends within it",
        400,
        "bad_body",
        lambda: in_json(base64.b64encode(half_jpeg()[: FULL_BYTES * 3 // 4]))[:-3],
        _JSON,
    ),
    Attack("24 MB of blanks in base64", 422, "image_unreadable", lambda: in_json(b"AA AA " * (FULL_BYTES // 6)), _JSON),
    Attack("24 MB of stars in base64", 422, "image_unreadable", lambda: in_json(b"*" * FULL_BYTES), _JSON),
    Attack("24 MB of backslashes", 422, "image_unreadable", lambda: in_json(b"\\\\" * (FULL_BYTES // 2)), _JSON),
    Attack("24 MB of quotes, escaped", 422, "image_unreadable", lambda: in_json(b'\\"' * (FULL_BYTES // 2)), _JSON),
    Attack("24 MB of quotes", 400, "bad_body", lambda: in_json(b'"' * FULL_BYTES), _JSON),
    Attack("24 MB of empty strings", 400, "bad_body", lambda: b'{"images": [' + b'"",' * (FULL_BYTES // 3), _JSON),
    # forms
    Attack("ten thousand parts", 413, "too_many_images", lambda: form(part(b"x") * 10_000), _FORM),
    Attack(
        "a part header without end",
        400,
        "bad_body",
        lambda: form(part(b"x", more_headers=b"A: " + b"b" * 5_000_000)),
        _FORM,
    ),
    Attack(
        "a part with 100,000 headers",
        400,
        "bad_body",
        lambda: form(part(b"x", more_headers=b"A: b\r\n" * 100_000)),
        _FORM,
    ),
    Attack("a boundary of nothing", 400, "bad_body", lambda: b"----\r\n" * 100_000, "multipart/form-data; boundary="),
    Attack("a million almost-boundaries", 400, "bad_body", lambda: form(part(b"\r\n--frontierx" * 500_000)), _FORM),
    Attack("a form that never ends", 400, "bad_body", lambda: part(bytes(5_000_000)), _FORM),
    Attack("a part of another name", 400, "bad_body", lambda: form(part(b"x", name="y" * 5000)), _FORM),
    # JSON
    Attack("a hundred thousand brackets", 400, "bad_body", lambda: b"[" * 100_000, _JSON),
    Attack("ninety objects in one another", 400, "bad_body", lambda: b'{"images":' * 90 + b"1" + b"}" * 90, _JSON),
    Attack("five million empty lists", 400, "bad_body", lambda: b'{"images": [' + b"[]," * 5_000_000 + b"[]]}", _JSON),
    Attack(
        "five million empty objects",
        413,
        "too_many_images",
        lambda: b'{"images": [' + b"{}," * 5_000_000 + b"{}]}",
        _JSON,
    ),
    Attack("a number of a million digits", 400, "bad_body", lambda: b'{"images": ' + b"9" * 1_000_000 + b"}", _JSON),
    Attack("1e999", 400, "bad_body", lambda: b'{"images": 1e999}', _JSON),
    Attack("NaN", 400, "bad_body", lambda: b'{"images": [NaN]}', _JSON),
    Attack("base64 of blanks", 422, "image_unreadable", lambda: in_json(b"AA AA " * 1_000_000), _JSON),
    Attack("base64 that is none", 422, "image_unreadable", lambda: in_json(b"*" * 1_000_000), _JSON),
    Attack("a bomb in base64", 413, "too_many_pixels", lambda: in_json(base64.b64encode(png_19000())), _JSON),
    Attack("a URL", 400, "bad_body", lambda: b'{"images": [{"url": "http://127.0.0.1/a.png"}]}', _JSON),
    Attack(
        "gzip",
        415,
        "unsupported_media_type",
        lambda: zlib.compress(bytes(1000)),
        "image/png",
        headers={"Content-Encoding": "gzip"},
    ),
    # parameters
    *(
        Attack(f"?{query[:30]}", 400, "bad_parameter", small_png, query=query)
        for query in (
            "threshold=nan",
            "threshold=inf",
            "threshold=1e999",
            "threshold=-0.1",
            "threshold=0.1&threshold=0.9",
            "max_detections=" + "9" * 5000,
            "max_detections=-1",
            "classes=" + "x," * 10_000,
            "units=%00",
            "&".join(f"p{number}=1" for number in range(2000)),
        )
    ),
    Attack("X-Timeout-Ms: 1e999", 400, "bad_parameter", small_png, headers={"X-Timeout-Ms": "1e999"}),
    Attack("a content type of 10 KB", 415, "unsupported_media_type", small_png, "multipart/form-data; " + "a;" * 5000),
    # the wire
    Attack("chunks without end", 413, "too_many_bytes", wire=endless_chunks),
    Attack("a JPEG in chunks without end", 413, "too_many_bytes", wire=endless_jpeg),
    Attack("a length of a terabyte", 413, "too_many_bytes", wire=lying_length),
    Attack("a length of a terabyte behind 5000 zeros", 413, "too_many_bytes", wire=lying_length_behind_zeros),
    Attack("70 KB of headers in one piece", 431, "too_many_header_bytes", wire=large_headers),
    Attack("a byte every 50 ms", 408, "body_timeout", wire=slow_body),
    Attack("chunks that are none", 400, "", wire=bad_chunks),
    Attack("headers without end", 431, "too_many_header_bytes", wire=endless_headers),
    Attack("a header without end", 431, "too_many_header_bytes", wire=endless_header),
    Attack("a path without end", 431, "too_many_header_bytes", wire=endless_path),
    Attack("a chunk header without end", 431, "too_many_header_bytes", wire=endless_chunk_header),
    Attack("trailers without end", 431, "too_many_header_bytes", wire=endless_trailers),
    Attack("a trailer without end", 431, "too_many_header_bytes", wire=endless_trailer),
)
