"""What a batch takes, by its canvas and size, and what an image takes to decode, learnt from what was measured."""

import math
import statistics
from bisect import bisect_left
from collections import deque

from bundle import Canvas

_WINDOW = 32  # newest batches of a canvas that are remembered: a size that is not run any more is forgotten with them
_NEWEST = 5  # of a size; their median is what counts: two outliers do nothing, and a third is none
_DECODES = 33  # newest pictures whose median stands for all
_NEWEST_SHARE = 0.02  # weight of the newest image in the mix of canvases
_LONGEST_RETRY_S = 60


class Estimate:
    """Until the first batch nothing is known, and nothing is promised."""

    def __init__(self, engine_instances: int) -> None:
        self.engine_instances = engine_instances
        self.decode_s = 0.0
        """Seconds in a decoding thread, of an image."""
        self.slowest_s = 0.0
        """Engine seconds of an image where they are most: in the slowest batch size of the slowest canvas."""
        self._batches: dict[Canvas, deque[tuple[int, float]]] = {}  # size and seconds, oldest first
        self._typical: dict[Canvas, dict[int, float]] = {}  # median seconds by size, ascending sizes
        self._decodes: deque[float] = deque(maxlen=_DECODES)
        self._shares: dict[Canvas, float] = {}

    def take_over(self, other: "Estimate") -> None:
        """Begin with what `other` knows of the pictures that come: how long they take to decode, and their canvases.

        What a batch takes is this one's own, and so is which canvases there are.
        """
        self._decodes, self.decode_s = other._decodes.copy(), other.decode_s
        shares = {canvas: share for canvas, share in other._shares.items() if canvas in self._typical}
        total = sum(shares.values())
        self._shares = {canvas: share / total for canvas, share in shares.items()}

    def observe(self, canvas: Canvas, images: int, seconds: float) -> None:
        """A batch of `images` images of `canvas` took `seconds` in one engine."""
        batches = self._batches.setdefault(canvas, deque(maxlen=_WINDOW))
        changed = {images, batches[0][0]} if len(batches) == _WINDOW else {images}  # the oldest makes room
        batches.append((images, seconds))
        typical = self._typical.get(canvas, {})
        for size in changed:
            newest = [took_s for each, took_s in batches if each == size][-_NEWEST:]
            if newest:
                typical[size] = statistics.median(newest)
            else:
                del typical[size]
        self._typical[canvas] = dict(sorted(typical.items()))
        # Of sizes below those that were seen nothing better is known than of the smallest.
        slowest = [
            max(next(iter(each.values())), *[took_s / size for size, took_s in each.items()])
            for each in self._typical.values()
        ]
        self.slowest_s = max(slowest)

    def observe_decoding(self, canvas: Canvas, seconds: float) -> None:
        """An image has taken a decoding thread `seconds`, and is found to need `canvas`."""
        self._decodes.append(seconds)
        self.decode_s = statistics.median(self._decodes)
        for known in self._shares:
            self._shares[known] *= 1 - _NEWEST_SHARE
        # The first one of all is the whole mix.
        self._shares[canvas] = self._shares.get(canvas, 0.0) + (_NEWEST_SHARE if self._shares else 1.0)

    def batch_s(self, canvas: Canvas, images: float) -> float | None:
        """Engine seconds that a batch of `images` images of `canvas` will take; None if nothing is known yet.

        Sizes not seen lie on the line between those that were; a canvas not seen costs as the nearest by its pixels.
        """
        typical = self._typical.get(canvas)
        if typical is not None:
            return typical[images] if images in typical else _interpolate(typical, images)  # type: ignore[index]
        if not self._typical:
            return None
        area = _area(canvas)
        nearest = min(self._typical, key=lambda known: abs(math.log(_area(known) / area)))
        return _interpolate(self._typical[nearest], images) * area / _area(nearest)

    def mix(self) -> dict[Canvas, float]:
        """The share of each canvas in what has come lately; before anything has come all are as likely."""
        return self._shares or dict.fromkeys(self._typical, 1 / max(1, len(self._typical)))

    def rate(self, batch_size: int) -> float:
        """Images a second that the engines work off in batches of `batch_size`; infinite if nothing is known yet."""
        batch_s = sum(share * (self.batch_s(canvas, batch_size) or 0.0) for canvas, share in self.mix().items())
        return self.engine_instances * batch_size / batch_s if batch_s else math.inf

    def retry_after_s(self, images: int) -> int:
        """Whole seconds after which `images` images are worked off one by one: 1 to 60."""
        return min(_LONGEST_RETRY_S, max(1, math.ceil(images / self.rate(1))))


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
