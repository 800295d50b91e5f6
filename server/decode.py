"""Bytes to pixels: what a person sees when opening the file, as RGB."""

import io
import re
from collections.abc import Callable

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from server.errors import ImageError, ImageTruncated
from server.headers import Header, read_header
from server.resize import Pixels

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURN: dict[int, Callable[[Pixels], Pixels]] = {  # the same for arrays
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, 3),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}
_WHITE = (255, 255, 255)

_BAND_PIXELS = 1 << 20
"""Large pictures are converted in bands of rows of about this size. In one go numpy's copy of a picture takes 6 bytes a
pixel for a moment, and scaling wide values takes 8 in float64."""


def prepare_decoding(threads: int) -> None:
    """Set Pillow up, for the whole process, for `threads` threads that decode.

    Its plugins are loaded now and not by the first request. It keeps the memory of as many pictures as are worked on:
    otherwise every picture's memory is fresh from the kernel, page by page, which is a third of a request's CPU time.
    """
    Image.init()
    # Two each: a picture, and what it is resized or converted to.
    Image.core.set_blocks_max(2 * threads)  # type: ignore[attr-defined]


def drop_kept_memory() -> None:
    """Let go of what Pillow keeps of earlier pictures; the next ones take theirs from the kernel again."""
    Image.core.clear_cache()  # type: ignore[attr-defined]


def decode(data: bytes, max_image_pixels: int) -> Image.Image:
    """The picture in `data`: mode RGB, in its displayed orientation, transparency over white.

    Limits are checked on the header, before pixels are decoded. Raises ImageError or one of its kinds.
    """
    return decode_picture(read_header(data, max_image_pixels))


def decode_pixels(header: Header) -> Pixels:
    """`decode_picture` as an array [h, w, 3]; for a plain JPEG the same bytes in half the time."""
    pixels = _decode_jpeg(header) if header.format == "JPEG" else None
    return _to_array(decode_picture(header)) if pixels is None else pixels


def decode_picture(header: Header) -> Image.Image:
    """The picture of a file whose header has been read. Raises ImageError or one of its kinds."""
    try:
        picture = _to_rgb(_load(header))
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever a hostile file makes them stumble on
        if isinstance(error, EOFError) or re.search("truncated|unexpected end|incomplete", str(error), re.IGNORECASE):
            raise ImageTruncated(f"the {header.format} file ends before the picture does") from error
        raise ImageError(f"the {header.format} file cannot be decoded: {error}") from error
    method = _TRANSPOSE.get(header.orientation)
    return picture if method is None else picture.transpose(method)


def _decode_jpeg(header: Header) -> Pixels | None:
    """By libjpeg-turbo, which Pillow calls too, without its detours. None for what Pillow shall judge: CMYK, errors."""
    try:
        colours = simplejpeg.decode_jpeg_header(header.file, strict=True)[2]
        if colours in {"CMYK", "YCCK"}:
            return None
        pixels = simplejpeg.decode_jpeg(header.file, "RGB", strict=True)
    except ValueError:
        return None
    if pixels.shape != (header.height, header.width, 3):
        return None
    turn = _TURN.get(header.orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _load(header: Header) -> Image.Image:
    """The picture as it is stored."""
    image = Image.open(io.BytesIO(header.file), formats=[header.format])
    if image.size != (header.width, header.height):
        raise ImageError(
            f"the {header.format} file's header says {header.width}x{header.height} in one place "
            f"and {image.width}x{image.height} in another"
        )
    if header.format == "WEBP":
        return _load_webp(image)
    image.load()
    return image


def _load_webp(image: Image.Image) -> Image.Image:
    """As `image.load()`, with 4 bytes a pixel instead of 16 from when libwebp is done.

    Its decoder, with two canvases, lives as long as Pillow's image; what it gives is a picture already.
    """
    size, mode = image.size, image.rawmode  # type: ignore[attr-defined]
    rgba, _, _ = image._get_next()  # type: ignore[attr-defined]
    image._decoder = None  # type: ignore[attr-defined]
    return Image.frombuffer(mode, size, rgba, "raw", mode, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        return _to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        picture = Image.new("RGB", layer.size, _WHITE)
        picture.paste(layer, mask=layer)
        return picture
    return image.convert("RGB")


def _to_array(picture: Image.Image) -> Pixels:
    if picture.width * picture.height <= _BAND_PIXELS:
        return np.asarray(picture)
    pixels = np.empty((picture.height, picture.width, 3), np.uint8)  # [h, w, 3]
    for box in _bands(picture):
        pixels[box[1] : box[3]] = np.asarray(picture.crop(box))
    return pixels


def _bands(image: Image.Image) -> list[tuple[int, int, int, int]]:
    rows = max(1, _BAND_PIXELS // image.width)
    return [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits, scaled from the range their file can hold (floats: 0..1 where they fit it)."""
    boxes = _bands(image)
    first = np.asarray(image.crop(boxes[0]))
    if first.dtype.kind == "f":
        ranges = [1.0, 255.0, 65535.0]
    elif first.dtype.itemsize <= 2:
        ranges = [65535.0]
    else:
        ranges = [65535.0, 2.0**31 - 1]
    white = ranges[0]
    if len(ranges) > 1:
        highest = max(float(np.nan_to_num(np.asarray(image.crop(box))).max()) for box in boxes)
        white = next((limit for limit in ranges if highest <= limit), highest)
    grey = Image.new("L", image.size)
    for box in boxes:
        grey.paste(Image.fromarray(_scale(np.asarray(image.crop(box)), white)), box)
    return grey


def _scale(values: NDArray[np.generic], white: float) -> NDArray[np.uint8]:
    grey = np.nan_to_num(values.astype(np.float64))
    return np.clip(np.rint(grey * (255.0 / white)), 0, 255).astype(np.uint8)
