"""A new bundle's engine is shown some of the live pictures, and its answers are held against those that were given."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.engine import Engine, RawImageDetections, run_engine
from server.metrics import Metrics
from server.preprocess import Pixels, preprocess
from server.worker import Worker

_STRONG, _WEAK = 0.5, 0.3
"""A detection of the first score in one answer wants one of the second in the other: near a single threshold half of
all pairs would fall apart."""
_LEAST_IOU = 0.5

_MOST_WAITING = 4
MOST_BYTES = 16 << 20  # of a picture in memory; larger ones are not shown


@dataclass(frozen=True)
class Comparison:
    """What came of the pictures so far."""

    compared: int = 0
    disagreed: int = 0  # of those compared: agreement below what is asked for
    failed: int = 0  # the new engine raised
    dropped: int = 0  # it was busy, or the picture was too large to keep
    agreement: float = 1.0  # mean of those compared: share of strong detections with a partner


class Shadow:
    """Shows `percent` of the live pictures to `engine`, one at a time, in a thread of its own.

    A live request waits for nothing here and is not told of anything that goes wrong: a picture that comes while
    others wait is dropped.
    """

    def __init__(self, engine: Engine, percent: float, least_agreement: float, metrics: Metrics) -> None:
        self._engine = engine
        self._percent = percent
        self._least_agreement = least_agreement
        self._metrics = metrics
        self._worker = Worker("shadow")
        self._free = threading.Semaphore(_MOST_WAITING)
        self._due = 0.0
        self._stopped = False
        self._compared = self._disagreed = self._failed = self._dropped = 0
        self._agreement = 0.0

    @property
    def so_far(self) -> Comparison:
        """What came of the pictures so far."""
        mean = self._agreement / self._compared if self._compared else 1.0
        return Comparison(self._compared, self._disagreed, self._failed, self._dropped, mean)

    def want(self) -> Copy | None:
        """A place for the picture that comes now, if it is one to show and there is room. For the event loop."""
        self._due += self._percent
        if self._due < 100:
            return None
        self._due -= 100
        if not self._stopped and self._free.acquire(blocking=False):
            return Copy(self)
        self._drop()
        return None

    def stop(self) -> Future[None]:
        """Compare nothing more; the future is done when the engine is at rest."""
        self._stopped = True
        at_rest = self._worker.submit(lambda: None)
        self._worker.stop()
        return at_rest

    def _show(self, picture: Pixels, given: RawImageDetections, categories: Mapping[int, str]) -> None:
        if self._stopped:
            return
        manifest = self._engine.manifest
        try:
            pixels, canvas = preprocess(picture, manifest)
            found = run_engine(self._engine, [pixels], canvas).of_slot(0)
        except Exception:
            self._failed += 1
            self._metrics.shadow_images.labels("failed").inc()
            return
        agreed = agreement(given, categories, found, manifest.categories)
        self._compared += 1
        self._agreement += agreed
        self._disagreed += agreed < self._least_agreement
        self._metrics.shadow_images.labels("disagreed" if agreed < self._least_agreement else "agreed").inc()

    def _drop(self) -> None:
        self._dropped += 1
        self._metrics.shadow_images.labels("dropped").inc()


class Copy:
    """One live picture on its way to the shadow. Whatever becomes of it, `leave` gives its place back."""

    def __init__(self, shadow: Shadow) -> None:
        self._shadow = shadow
        self._picture: Pixels | None = None
        self._shown = False

    def keep(self, picture: Pixels) -> None:
        """The picture, decoded; any thread."""
        if picture.nbytes <= MOST_BYTES:
            self._picture = picture

    def show(self, given: RawImageDetections, categories: Mapping[int, str]) -> None:
        """What the bundle in service answered."""
        if self._picture is None:
            self._shadow._drop()
            return
        self._shown = True
        showing = self._shadow._worker.submit(self._shadow._show, self._picture, given, categories)
        showing.add_done_callback(lambda _: self._shadow._free.release())
        self._picture = None

    def leave(self) -> None:
        """It is shown, or will not be."""
        if not self._shown:
            self._shown = True
            self._shadow._free.release()


def agreement(
    one: RawImageDetections, one_names: Mapping[int, str], other: RawImageDetections, other_names: Mapping[int, str]
) -> float:
    """How far two answers to a picture agree: the share of the strong detections of both with a partner in the other.

    A partner has the same label by name, at least a weak score, and an IoU of 0.5; one to one, the strongest first.
    1 where neither finds anything strong.
    """
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


def _iou(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """Boxes [K1, 4] and [K2, 4] in x0, y0, x1, y1 -> [K1, K2]."""
    a, b = one.astype(np.float64)[:, None], other.astype(np.float64)[None]
    overlap = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0.0, None).prod(-1)
    area_a, area_b = (np.clip(each[..., 2:] - each[..., :2], 0.0, None).prod(-1) for each in (a, b))
    union = area_a + area_b - overlap
    iou: NDArray[np.float64] = np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)
    return iou
