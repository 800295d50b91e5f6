"""The paper's resize: bilinear, antialiased on shrinking, as Pillow does it; natively where the library is built."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import plugins

Pixels: TypeAlias = NDArray[np.uint8]  # [h, w, 3] RGB


def resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """[h, w, 3] uint8 RGB -> [height, width, 3]: natively some ten times as fast.

    The same bytes either way; within a level where the height shrinks much more than the width.
    Other threads run on meanwhile. Raises ValueError for a side below 1 or above 65535.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    if not all(1 <= side <= 65_535 for side in (*pixels.shape[:2], height, width)):
        raise ValueError(f"cannot resize {pixels.shape[1]}x{pixels.shape[0]} to {width}x{height} pixels")
    native = _native()
    if native is None:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    source = np.ascontiguousarray(pixels)
    target = np.empty((height, width, 3), np.uint8)
    if native(source.ctypes.data, *source.shape[:2], target.ctypes.data, height, width):
        raise MemoryError(f"no memory to resize {pixels.shape[1]}x{pixels.shape[0]} to {width}x{height} pixels")
    return target


@cache
def _native() -> Callable[..., int] | None:
    path = plugins.resize_library()
    if path is None:
        return None
    function = ctypes.CDLL(str(path)).resize_rgb  # ctypes lets go of Python's lock during the call
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64] * 2
    function.restype = ctypes.c_int32
    return function
