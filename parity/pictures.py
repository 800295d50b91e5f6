"""The pictures of a proof: drawn from a seed by integers alone, so that every machine draws the same bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bundle import Canvas

FILLS = ((256, 256), (190, 248), (226, 134), (239, 208), (141, 222))
"""How much of the canvas's height and width a picture fills, in 256ths; the first fills all of it."""
_OCTAVES = ((4, 7), (11, 6), (29, 5))  # cells a side, and the strength of their field as a power of two
_SPOTS = 24
_GRAIN = 128  # side of the square of noise that is repeated, px
_UNIT = 7  # fractional bits of an interpolation's weights: with values of 8 bits all fits into 16

Integers = NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures on one canvas: images uint8 [N, H, W, 3], zero outside; sizes int64 [N, 2] (h, w) of the filled part."""

    images: NDArray[np.uint8]
    sizes: NDArray[np.int64]

    def take(self, indices: list[int]) -> "Pictures":
        """A batch of the pictures of these indices, one a slot."""
        return Pictures(self.images[indices], self.sizes[indices])


def proof_pictures(canvas: Canvas, seed: int, count: int) -> Pictures:
    """`count` pictures on `canvas`, of seeds that follow from one."""
    return draw_pictures(canvas, tuple(range(seed, seed + count)))


def draw_pictures(canvas: Canvas, seeds: Sequence[int]) -> Pictures:
    """A picture of each seed, each of another fill: smooth fields, spots with hard edges, and grain."""
    images = np.zeros((len(seeds), canvas.height, canvas.width, 3), np.uint8)
    sizes = np.zeros((len(seeds), 2), np.int64)
    for index, seed in enumerate(seeds):
        fill_h, fill_w = FILLS[index % len(FILLS)]
        height, width = max(1, canvas.height * fill_h >> 8), max(1, canvas.width * fill_w >> 8)
        images[index, :height, :width] = _picture(height, width, seed)
        sizes[index] = height, width
    return Pictures(images, sizes)


def random_integers(seed: int, stream: int, count: int) -> NDArray[np.uint64]:
    """`count` numbers of splitmix64, the generator's counter started by `seed` and `stream`: uint64 [count]."""
    gamma = np.uint64(0x9E3779B97F4A7C15)
    start = np.uint64((seed * 0xD1342543DE82EF95 + stream * 0xAF251AF3B0F025B5) % 2**64)
    z = np.arange(1, count + 1, dtype=np.uint64) * gamma + start  # wraps, as it should
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _picture(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    levels = np.full((height, width, 3), 128, np.int16)
    for stream, (cells, strength) in enumerate(_OCTAVES):
        field = _field(seed, stream, height, width, cells)
        field >>= np.int16(8 - strength)
        levels += field
    _add_spots(levels, seed)
    noise = (random_integers(seed, 99, _GRAIN * _GRAIN * 3) % np.uint64(25)).astype(np.int16) - 12
    repeats = (-(-height // _GRAIN), -(-width // _GRAIN), 1)
    levels += np.tile(noise.reshape(_GRAIN, _GRAIN, 3), repeats)[:height, :width]
    np.clip(levels, 0, 255, out=levels)
    return levels.astype(np.uint8)


def _field(seed: int, stream: int, height: int, width: int, cells: int) -> Integers:
    """Values of -128..127 on a grid of `cells` a side, interpolated linearly: [height, width, 3]."""
    nodes = (random_integers(seed, stream, (cells + 1) ** 2 * 3) >> np.uint64(56)).astype(np.int16) - 128
    nodes = nodes.reshape(cells + 1, cells + 1, 3)
    row, v = _weights(height, cells)
    column, u = _weights(width, cells)
    one = np.int16(1 << _UNIT)
    across = nodes[:, column] * (one - u)[:, None] + nodes[:, column + 1] * u[:, None]  # [cells + 1, width, 3]
    across >>= np.int16(_UNIT)
    rows = across.reshape(cells + 1, width * 3)
    field: Integers = rows[row]
    field *= (one - v)[:, None]
    field += rows[row + 1] * v[:, None]
    field >>= np.int16(_UNIT)
    return field.reshape(height, width, 3)


def _weights(side: int, cells: int) -> tuple[NDArray[np.int64], Integers]:
    """For each pixel the grid's node before it, and the weight of the one after it in 1 << _UNIT."""
    place = (np.arange(side, dtype=np.int64) * cells << _UNIT) // side
    return place >> _UNIT, (place & ((1 << _UNIT) - 1)).astype(np.int16)


def _add_spots(levels: Integers, seed: int) -> None:
    """Ellipses with a hard edge and a paler middle, of one to fourteen hundredths of the shorter side."""
    height, width, _ = levels.shape
    numbers = random_integers(seed, 50, _SPOTS * 7).reshape(_SPOTS, 7)
    short = min(height, width)
    for number in numbers:
        y, x, a, b, *colour = (int(n >> np.uint64(16)) for n in number)
        a, b = (max(2, short // 40 + r % max(1, short // 9)) for r in (a, b))
        y, x = y % height, x % width
        top, left = max(0, y - a), max(0, x - b)
        part = levels[top : y + a + 1, left : x + b + 1]
        dy = np.arange(top, top + part.shape[0], dtype=np.int64)[:, None] - y
        dx = np.arange(left, left + part.shape[1], dtype=np.int64)[None] - x
        distance = (dy * dy * 1024) // (a * a) + (dx * dx * 1024) // (b * b)  # 1024 on the edge
        shade = np.where(distance <= 1024, 1280 - np.maximum(0, 512 - distance), 0)[..., None]
        part += (shade * np.array([c % 181 - 120 for c in colour], np.int64) // 1280).astype(np.int16)
