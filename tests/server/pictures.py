"""Pictures with a bright rectangle at a known place, in every kind of file."""

import io

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 96, 64  # as displayed; MANIFEST's rule leaves this size as it is
BOX = (12, 8, 60, 32)  # x0, y0, x1, y1 in px, as displayed; multiples of 4, since JPEG blurs
BLACK = (0, 0, 0)
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def rectangle(
    color: tuple[int, int, int] = WHITE,
    box: tuple[int, int, int, int] = BOX,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    background: tuple[int, int, int] = BLACK,
) -> Image.Image:
    """An RGB picture of `size` (width, height) with one rectangle."""
    pixels = np.full((size[1], size[0], 3), background, np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = color
    return Image.fromarray(pixels)


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def poison() -> bytes:
    """A picture on which the fake engine raises."""
    return encode(Image.new("RGB", (WIDTH, HEIGHT), (77, 77, 77)))
