"""The outline of a cell: a rotated ellipse whose radius wobbles with the angle."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

_ANGLES = np.linspace(0.0, 2.0 * np.pi, 256, endpoint=False)


@dataclass(frozen=True)
class Window:
    """The part of the picture a cell may touch, rows y0..y1 and columns x0..x1, ends excluded, in px."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    @property
    def is_empty(self) -> bool:
        return self.x1 <= self.x0 or self.y1 <= self.y0


@dataclass(frozen=True)
class Outline:
    """Centre and half axes in px, `angle` in radians; `wobble` holds the (cos, sin) amplitudes of harmonics 2, 3, 4."""

    x: float
    y: float
    half_width: float
    half_height: float
    angle: float = 0.0
    wobble: tuple[tuple[float, float], ...] = ()

    @property
    def radius(self) -> float:
        return math.sqrt(self.half_width * self.half_height)

    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in px of the whole outline, also where it leaves the picture."""
        swell = np.ones_like(_ANGLES)
        for order, (in_phase, quadrature) in enumerate(self.wobble, start=2):
            swell += in_phase * np.cos(order * _ANGLES) + quadrature * np.sin(order * _ANGLES)
        u = self.half_width * swell * np.cos(_ANGLES)
        v = self.half_height * swell * np.sin(_ANGLES)
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        x = self.x + cos * u - sin * v
        y = self.y + sin * u + cos * v
        return float(x.min()), float(y.min()), float(x.max()), float(y.max())

    def window(self, height: int, width: int, margin: float) -> Window:
        x0, y0, x1, y1 = self.box()
        return Window(
            max(0, int(np.floor(x0 - margin))),
            max(0, int(np.floor(y0 - margin))),
            min(width, int(np.ceil(x1 + margin))),
            min(height, int(np.ceil(y1 + margin))),
        )

    def field(self, window: Window) -> FloatArray:
        """[h, w]: 0 at the centre, 1 on the outline, growing linearly along each ray."""
        x = np.arange(window.x0, window.x1, dtype=np.float32)[None, :] + np.float32(0.5 - self.x)
        y = np.arange(window.y0, window.y1, dtype=np.float32)[:, None] + np.float32(0.5 - self.y)
        cos, sin = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        u = (cos * x + sin * y) / np.float32(self.half_width)
        v = (cos * y - sin * x) / np.float32(self.half_height)
        rho = np.sqrt(u * u + v * v) + np.float32(1e-6)
        if not self.wobble:
            return rho
        u /= rho
        v /= rho
        swell = np.ones_like(rho)
        # cos and sin of k times the angle by the addition theorem: far cheaper than arctan2.
        cos_k, sin_k = u, v
        for in_phase, quadrature in self.wobble:
            cos_k, sin_k = u * cos_k - v * sin_k, u * sin_k + v * cos_k
            swell += np.float32(in_phase) * cos_k + np.float32(quadrature) * sin_k
        field: FloatArray = rho / swell
        return field


def smooth_step(value: FloatArray) -> FloatArray:
    """0 at -1 and below, 1 at +1 and above, smooth between."""
    t = np.clip(value * np.float32(0.5) + np.float32(0.5), 0.0, 1.0)
    step: FloatArray = t * t * (np.float32(3.0) - np.float32(2.0) * t)
    return step
