"""Bytes to pixels: what a person sees when opening the file, as RGB."""

import io
import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from server.errors import (
    FormatUnsupported,
    ImageAnimated,
    ImageEmpty,
    ImageError,
    ImageTooLarge,
    ImageTruncated,
)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
FORMAT_NAMES = "JPEG, PNG, WebP, BMP or TIFF"
LONGEST_SIDE_PX = 65_535
"""JPEG's own limit. A picture of 1x40000000 is within any limit of pixels, and takes seconds to resize."""

# Files that people do send, to be called by their name; everything else is just not a picture.
_KNOWN_OTHERS = (
    (re.compile(rb"GIF8"), "GIF"),
    (re.compile(rb".{4}ftyp(heic|heix|mif1|hevc)", re.DOTALL), "HEIC"),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "AVIF"),
    (re.compile(rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"), "JPEG 2000"),
    (re.compile(rb"\x00\x00\x01\x00"), "ICO"),
    (re.compile(rb"8BPS"), "PSD"),
    (re.compile(rb"%PDF"), "PDF"),
    (re.compile(rb"\s*<(?:[^\x00]*<)?svg"), "SVG"),
)

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_TAG = 0x0112
_WHITE = (255, 255, 255, 255)


def prepare_decoding(threads: int) -> None:
    """Set Pillow up, for the whole process, for `threads` threads that decode.

    Its plugins are loaded now and not by the first request. It keeps the memory of as many pictures as are worked on:
    otherwise every picture's memory is fresh from the kernel, page by page, which is a third of a request's CPU time.
    """
    Image.init()
    # Two each: a picture, and what it is resized or converted to.
    Image.core.set_blocks_max(2 * threads)  # type: ignore[attr-defined]


def decode(data: bytes, max_image_pixels: int) -> Image.Image:
    """The picture in `data`: mode RGB, in its displayed orientation, transparency over white.

    Limits are checked on the header, before pixels are decoded. Raises ImageError or one of its kinds.
    """
    image = _open(data, max_image_pixels)
    try:
        image.load()
        return _upright(_to_rgb(image), image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(str(error), max_image_pixels) from error
    except Exception as error:  # decoders raise whatever a hostile file makes them stumble on
        if isinstance(error, EOFError) or re.search("truncated|unexpected end|incomplete", str(error), re.IGNORECASE):
            raise ImageTruncated(f"the {image.format} file ends before the picture does") from error
        raise ImageError(f"the {image.format} file cannot be decoded: {error}") from error


def _open(data: bytes, max_image_pixels: int) -> Image.Image:
    if not data:
        raise ImageEmpty("no bytes where an image should be")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        for signature, name in _KNOWN_OTHERS:
            if signature.match(data[:1024]):
                raise FormatUnsupported(f"{name} is not supported; send {FORMAT_NAMES}") from error
        raise ImageError(f"not a picture in {FORMAT_NAMES}: {_excerpt(data)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(str(error), max_image_pixels) from error
    except Exception as error:
        raise ImageError(f"the file's header cannot be read: {error}") from error
    width, height = image.size
    if width * height > max_image_pixels:
        raise ImageTooLarge(f"{width}x{height} exceeds {max_image_pixels} pixels")
    if max(width, height) > LONGEST_SIDE_PX:
        raise ImageTooLarge(f"{width}x{height}: a side exceeds {LONGEST_SIDE_PX} px")
    # A TIFF's further pages and a phone's MPO previews are not an animation: the first picture is the picture.
    if image.format in {"PNG", "WEBP"} and getattr(image, "n_frames", 1) > 1:
        raise ImageAnimated(f"{getattr(image, 'n_frames', 1)} frames; send one picture")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, _WHITE), layer).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Grey values of more than 8 bits, scaled from the range their file can hold (floats: 0..1 where they fit it)."""
    grey = np.nan_to_num(values.astype(np.float64))
    if values.dtype.kind == "f":
        ranges = [1.0, 255.0, 65535.0]
    elif values.dtype.itemsize <= 2:
        ranges = [65535.0]
    else:
        ranges = [65535.0, 2.0**31 - 1]
    highest = float(grey.max(initial=0.0))
    white = next((limit for limit in ranges if highest <= limit), highest)
    return np.clip(np.rint(grey * (255.0 / white)), 0, 255).astype(np.uint8)


def _upright(picture: Image.Image, source: Image.Image) -> Image.Image:
    """`picture` turned as its EXIF orientation says. TIFF is turned by Pillow on loading, which resets the tag."""
    try:
        orientation = source.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken EXIF: every viewer shows such a picture as it is stored
        return picture
    method = _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None
    return picture if method is None else picture.transpose(method)


def _too_large(pillow_message: str, max_image_pixels: int) -> ImageTooLarge:
    found = re.search(r"\((\d+) pixels\)", pillow_message)
    pixels = f"{found[1]} pixels" if found else "the image's size"
    return ImageTooLarge(f"{pixels} exceeds {max_image_pixels} pixels")


def _excerpt(data: bytes) -> str:
    return f"it begins with {data[:8]!r}" if data.strip(b"\0") else f"{len(data)} zero bytes"
