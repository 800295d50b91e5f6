"""Live pictures are shown to a bundle beside the one in service, and its answers held against those that were given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bundle import Canvas, Manifest
from server.engine import RawImageDetections
from server.metrics import Metrics
from server.preprocess import Pixels, PreparedImage, preprocess
from server.served import Served
from server.timing import StageTimes

_STRONG, _WEAK = 0.5, 0.3
"""A detection of the first score in one answer wants one of the second in the other: near a single threshold half of
all pairs would fall apart."""
_LEAST_IOU = 0.5

_MOST_WAITING = 4
MOST_BYTES = 16 << 20
"""Of a decoded picture that is kept where the two bundles resize differently. Where they do not, what is kept is what
the engine in service gets, however large the picture."""
_LONGEST_S = 30.0  # that a picture may wait for the bundle's engine


@dataclass(frozen=True)
class Comparison:
    """What came of the pictures so far."""

    compared: int = 0
    disagreed: int = 0  # of those compared: agreement below what is asked for
    failed: int = 0  # the engine raised
    dropped: int = 0  # it was busy
    too_large: int = 0  # to be kept
    agreement: float = 1.0  # mean of those compared: share of strong detections with a partner


class Shadow:
    """Shows `percent` of the live pictures to `served`, one at a time, behind its own queue.

    A live request waits for nothing here and is not told of anything that goes wrong: a picture that comes while
    others wait is dropped. For the event loop, but for `Copy.keep`.
    """

    def __init__(
        self, served: Served, percent: float, least_agreement: float, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self._served = served
        self._percent = percent
        self._least_agreement = least_agreement
        self._metrics = metrics
        self._clock = clock
        self._one_at_a_time = asyncio.Lock()
        self._showing: set[asyncio.Task[None]] = set()
        self._waiting = 0
        self._due = 0.0
        self._stopped = False
        self._compared = self._disagreed = self._failed = self._dropped = self._too_large = 0
        self._agreement = 0.0

    @property
    def so_far(self) -> Comparison:
        """What came of the pictures so far."""
        mean = self._agreement / self._compared if self._compared else 1.0
        return Comparison(self._compared, self._disagreed, self._failed, self._dropped, self._too_large, mean)

    def want(self, served: Served) -> Copy | None:
        """A place for the picture that comes now and that `served` answers, if it is one to show and there is room."""
        if self._stopped or served is self._served:
            return None
        self._due += self._percent
        if self._due < 100:
            return None
        self._due -= 100
        if self._waiting >= _MOST_WAITING:
            self._drop()
            return None
        self._waiting += 1
        return Copy(self, served.manifest)

    def stop(self) -> None:
        """Compare nothing more; what is under way is given up."""
        self._stopped = True
        for showing in self._showing:
            showing.cancel()

    async def rest(self, patience_s: float) -> bool:
        """The same, but wait for what the engine has begun; whether it ended in time."""
        self._stopped = True
        hanging = (await asyncio.wait(self._showing, timeout=patience_s))[1] if self._showing else set()
        self.stop()
        return not hanging

    def _show(self, copy: Copy, given: RawImageDetections) -> bool:
        """Whether the copy's place is taken for longer."""
        if self._stopped:
            return False
        if copy.too_large:
            self._too_large += 1
            self._metrics.shadow_images.labels("too_large").inc()
            return False
        showing = asyncio.get_running_loop().create_task(self._compare(copy, given))
        self._showing.add(showing)
        showing.add_done_callback(self._end)
        return True

    def _end(self, showing: asyncio.Task[None]) -> None:
        self._showing.discard(showing)
        self._waiting -= 1

    async def _compare(self, copy: Copy, given: RawImageDetections) -> None:
        mine, live = self._served.manifest, copy.manifest
        async with self._one_at_a_time:
            if self._stopped:
                return
            try:
                if (prepared := copy.prepared) is None:
                    prepared = await asyncio.to_thread(preprocess, copy.picture, mine)
                pixels, canvas = prepared
                image = PreparedImage(pixels, canvas, pixels.shape[1], pixels.shape[0], StageTimes())
                # The batcher's: what this bundle is judged by in service is not mixed with pictures that it is shown.
                answer = await self._served.batcher.infer(image, self._clock() + _LONGEST_S, priority="batch")
            except Exception:
                self._failed += 1
                self._metrics.shadow_images.labels("failed").inc()
                return
            agreed = await asyncio.to_thread(agreement, given, live.categories, answer.raw, mine.categories)
        agrees = agreed >= self._least_agreement
        self._compared += 1
        self._agreement += agreed
        self._disagreed += not agrees
        self._metrics.shadow_images.labels("agreed" if agrees else "disagreed").inc()

    def _drop(self) -> None:
        self._dropped += 1
        self._metrics.shadow_images.labels("dropped").inc()


class Copy:
    """One live picture on its way to the shadow. Whatever becomes of it, `leave` gives its place back."""

    def __init__(self, shadow: Shadow, manifest: Manifest) -> None:
        self.manifest = manifest
        """Of the bundle that answers it."""
        self.picture: Pixels = _NO_PICTURE
        self.prepared: tuple[Pixels, Canvas] | None = None
        """As both bundles' engines get it, if they get the same."""
        self.too_large = False
        self._shadow = shadow
        self._gone = False

    def keep(self, picture: Pixels, pixels: Pixels, canvas: Canvas) -> None:
        """The picture decoded, and resized for the engine in service; any thread."""
        mine = self._shadow._served.manifest
        if (mine.resize, mine.canvases) == (self.manifest.resize, self.manifest.canvases):
            self.prepared = pixels, canvas
        elif picture.nbytes <= MOST_BYTES:
            self.picture = picture
        else:
            self.too_large = True

    def show(self, given: RawImageDetections) -> None:
        """What the bundle in service answered."""
        self._gone = self._shadow._show(self, given)

    def leave(self) -> None:
        """It is shown, or will not be."""
        if not self._gone:
            self._gone = True
            self._shadow._waiting -= 1


_NO_PICTURE = np.empty((0, 0, 3), np.uint8)


def agreement(
    one: RawImageDetections, one_names: Mapping[int, str], other: RawImageDetections, other_names: Mapping[int, str]
) -> float:
    """How far two answers to a picture agree: the share of the strong detections of both with a partner in the other.

    A partner has the same label by name, at least a weak score, and an IoU of 0.5; one to one, the strongest first.
    1 where neither finds anything strong.
    """
    one, other = _of_weight(one), _of_weight(other)
    iou = _iou(one.boxes, other.boxes)  # [K1, K2]
    same = np.array(
        [[one_names.get(a) == other_names.get(b) for b in other.labels.tolist()] for a in one.labels.tolist()], bool
    ).reshape(iou.shape)
    matches = np.where(same, iou, 0.0)
    strong = partnered = 0
    for pairs, here, there in ((matches, one.scores, other.scores), (matches.T, other.scores, one.scores)):
        free = there >= _WEAK
        for index in np.argsort(-here, kind="stable"):
            if here[index] < _STRONG:
                break
            strong += 1
            candidates = np.where(free, pairs[index], 0.0)
            best = int(candidates.argmax()) if candidates.size else 0
            if candidates.size and candidates[best] >= _LEAST_IOU:
                free[best] = False
                partnered += 1
    return partnered / strong if strong else 1.0


def _of_weight(answer: RawImageDetections) -> RawImageDetections:
    """Those that can be partners: of the hundreds in an answer most cannot, and all pairs would take 20 ms."""
    kept = answer.scores >= _WEAK
    return RawImageDetections(answer.boxes[kept], answer.scores[kept], answer.labels[kept])


def _iou(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """Boxes [K1, 4] and [K2, 4] in x0, y0, x1, y1 -> [K1, K2]."""
    a, b = one.astype(np.float64)[:, None], other.astype(np.float64)[None]
    overlap = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0.0, None).prod(-1)
    area_a, area_b = (np.clip(each[..., 2:] - each[..., :2], 0.0, None).prod(-1) for each in (a, b))
    union = area_a + area_b - overlap
    iou: NDArray[np.float64] = np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
    return iou
