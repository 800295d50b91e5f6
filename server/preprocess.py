"""Pixels to what the network reads: the paper's resize, then a canvas that holds the result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bundle import Canvas, CanvasError, Manifest, choose_canvas, resized_size
from server.errors import ShapeUnsupported
from server.timing import StageTimes

Pixels: TypeAlias = NDArray[np.uint8]  # [h, w, 3] RGB


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """One image, ready for a batch of its canvas."""

    pixels: Pixels  # [h, w, 3], resized, h and w at most the canvas's
    canvas: Canvas
    width: int  # of the picture as it is displayed, px
    height: int
    times: StageTimes


def preprocess(picture: Image.Image, manifest: Manifest) -> tuple[Pixels, Canvas]:
    """`picture` (RGB) resized by the manifest's rule, and the canvas it goes on.

    Bilinear, antialiased on shrinking, on 8-bit values: Pillow's own, which the paper's pipeline uses.
    Raises ShapeUnsupported if no canvas does.
    """
    height, width = resized_size(picture.height, picture.width, manifest.resize)
    try:
        canvas = choose_canvas(height, width, manifest.canvases)
    except CanvasError as error:
        raise ShapeUnsupported(f"{picture.width}x{picture.height} pixels, resized: {error}") from error
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture), canvas


def lay_on_canvas(images: Sequence[Pixels], canvas: Canvas) -> tuple[Pixels, NDArray[np.int64]]:
    """The served graph's inputs: images [N, H, W, 3] uint8, zeros around each image, and sizes [N, 2] (h, w) int64."""
    batch = np.zeros((len(images), canvas.height, canvas.width, 3), np.uint8)  # [N, H, W, 3]
    sizes = np.empty((len(images), 2), np.int64)  # [N, 2]
    for slot, pixels in enumerate(images):
        height, width, _ = pixels.shape
        batch[slot, :height, :width] = pixels
        sizes[slot] = height, width
    return batch, sizes
