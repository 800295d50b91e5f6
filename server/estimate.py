"""What a batch takes, by its canvas and size, learnt from the batches that were run."""

import math
import statistics
from bisect import bisect_left
from collections import deque

from bundle import Canvas

_WINDOW = 64  # newest batches of a canvas that are remembered: a size that is not run any more is forgotten with them
_NEWEST = 9  # of a size; their median is what counts, so up to four outliers do nothing
_NEWEST_SHARE = 0.2  # weight of the newest batch in the moving average


class Estimate:
    """Until the first batch nothing is known, and nothing is promised."""

    def __init__(self, engine_instances: int) -> None:
        self._instances = engine_instances
        self._seconds_per_image: float | None = None
        self._batches: dict[Canvas, deque[tuple[int, float]]] = {}  # size and seconds, oldest first
        self._typical: dict[Canvas, dict[int, float]] = {}  # median seconds by size, ascending sizes
        self.slowest_batch_s = 0.0

    def observe(self, canvas: Canvas, images: int, seconds: float) -> None:
        """A batch of `images` images of `canvas` took `seconds` in one engine."""
        batches = self._batches.setdefault(canvas, deque(maxlen=_WINDOW))
        batches.append((images, seconds))
        by_size: dict[int, list[float]] = {}
        for size, each in reversed(batches):
            newest = by_size.setdefault(size, [])
            if len(newest) < _NEWEST:
                newest.append(each)
        self._typical[canvas] = {size: statistics.median(by_size[size]) for size in sorted(by_size)}
        self.slowest_batch_s = max(self.slowest_batch_s, seconds)
        each = seconds / images
        if self._seconds_per_image is None:
            self._seconds_per_image = each
        else:
            self._seconds_per_image += _NEWEST_SHARE * (each - self._seconds_per_image)

    def batch_s(self, canvas: Canvas, images: int) -> float | None:
        """Engine seconds that a batch of `images` images of `canvas` will take; None if nothing is known yet.

        Sizes not seen lie on the line between those that were; a canvas not seen costs as the nearest by its pixels.
        """
        if not self._typical:
            return None
        if canvas not in self._typical:
            area = _area(canvas)
            nearest = min(self._typical, key=lambda known: abs(math.log(_area(known) / area)))
            return _interpolate(self._typical[nearest], images) * area / _area(nearest)
        return _interpolate(self._typical[canvas], images)

    def seconds_for(self, images: int) -> float:
        """Time until `images` images are worked off, all engines helping."""
        return images * (self._seconds_per_image or 0.0) / self._instances

    def retry_after_s(self, images: int) -> int:
        """Whole seconds after which `images` images are worked off, at least 1: a Retry-After."""
        return max(1, math.ceil(self.seconds_for(images)))


def _interpolate(typical: dict[int, float], images: float) -> float:
    """Seconds of a batch of `images` images, where `typical` has those of some sizes, ascending.

    A batch is never quicker than a smaller one, and never slower than the smaller one would be image by image: outside
    of what is known that is the bound which is taken.
    """
    sizes = list(typical)
    upper = bisect_left(sizes, images)
    if upper == 0:
        return typical[sizes[0]]
    below = sizes[upper - 1]
    if upper == len(sizes):
        return typical[below] * images / below
    above = sizes[upper]
    share = (images - below) / (above - below)
    return typical[below] + share * (typical[above] - typical[below])


def _area(canvas: Canvas) -> int:
    return canvas.height * canvas.width
