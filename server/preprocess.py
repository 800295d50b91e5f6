"""Pixels to what the network reads: the paper's resize, then a canvas that holds the result."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bundle import Canvas, CanvasError, Manifest, choose_canvas, resized_size
from server.errors import ShapeUnsupported
from server.resize import Pixels as Pixels
from server.resize import resize
from server.timing import StageTimes


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """One image, ready for a batch of its canvas."""

    pixels: Pixels  # [h, w, 3], resized, h and w at most the canvas's
    canvas: Canvas
    width: int  # of the picture as it is displayed, px
    height: int
    times: StageTimes


def preprocess(picture: Pixels, manifest: Manifest) -> tuple[Pixels, Canvas]:
    """`picture` [h, w, 3] resized by the manifest's rule, and the canvas it goes on.

    Bilinear, antialiased on shrinking, on 8-bit values: as Pillow does it, which the paper's pipeline uses.
    Raises ShapeUnsupported if no canvas holds it.
    """
    height, width = resized_size(picture.shape[0], picture.shape[1], manifest.resize)
    try:
        canvas = choose_canvas(height, width, manifest.canvases)
    except CanvasError as error:
        raise ShapeUnsupported(f"{picture.shape[1]}x{picture.shape[0]} pixels, resized: {error}") from error
    return resize(picture, height, width), canvas


def lay_on_canvas(images: Sequence[Pixels], canvas: Canvas) -> tuple[Pixels, NDArray[np.int64]]:
    """The served graph's inputs: images [N, H, W, 3] uint8, zeros around each image, and sizes [N, 2] (h, w) int64."""
    batch = np.empty((len(images), canvas.height, canvas.width, 3), np.uint8)  # [N, H, W, 3]
    sizes = np.empty((len(images), 2), np.int64)  # [N, 2]
    lay_in(images, batch, sizes)
    return batch, sizes


def lay_in(images: Sequence[Pixels], batch: Pixels, sizes: NDArray[np.int64]) -> None:
    """The same into memory that is there: batch [N, H, W, 3] and sizes [N, 2] are written whole."""
    for slot, pixels in enumerate(images):
        height, width, _ = pixels.shape
        batch[slot, :height, :width] = pixels
        if width < batch.shape[2]:
            batch[slot, :height, width:] = 0
        if height < batch.shape[1]:
            batch[slot, height:] = 0
        sizes[slot] = height, width
