"""A deterministic engine: it finds what is bright, and misbehaves when told to."""

import threading
from collections.abc import Sequence

import numpy as np

from bundle import Canvas, Manifest, ModelName, ResizeRule, canvases_for
from server.engine import RawDetections
from server.preprocess import Pixels, lay_on_canvas

RULE = ResizeRule(shortest=64, longest=96)
MANIFEST = Manifest(
    model=ModelName(name="bright", version="7"),
    variant="fake",
    categories={1: "red", 2: "green", 5: "blue"},
    resize=RULE,
    canvases=canvases_for(RULE),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    max_detections=3,
)
BRIGHT = 128
SCORES = (0.9, 0.6, 0.2)
POISON = 77  # a grey level: an image with a pixel of exactly this in its first corner makes the engine raise


class FakeEngine:
    """For each class of MANIFEST the box of the pixels bright in its channel, and whatever trouble is asked for."""

    def __init__(self, manifest: Manifest = MANIFEST) -> None:
        self.manifest = manifest
        self.name = "fake"
        self.batches: list[tuple[int, Canvas]] = []  # size and canvas of each batch that was inferred
        self.gate = threading.Event()  # closed: `infer` waits for it
        self.gate.set()
        self.entered = threading.Semaphore(0)  # released whenever `infer` begins
        self.trouble: str | None = None  # "raise", "nan", "shape", "exit"
        self.closed = False
        self._canvas = Canvas(height=1, width=1)

    def prepare(self, images: Sequence[Pixels], canvas: Canvas) -> tuple[Pixels, np.ndarray]:
        self._canvas = canvas
        return lay_on_canvas(images, canvas)

    def infer(self, inputs: tuple[Pixels, np.ndarray]) -> RawDetections:
        images, sizes = inputs
        self.batches.append((len(images), self._canvas))
        self.entered.release()
        if not self.gate.wait(timeout=30):
            raise TimeoutError("nobody opened the gate")
        if self.trouble == "raise":
            raise RuntimeError("told to")
        if self.trouble == "exit":
            raise SystemExit(3)
        if any((image[0, 0] == POISON).all() for image in images):
            raise RuntimeError("poison")
        boxes = np.zeros((len(images), 3, 4), np.float32)
        scores = np.zeros((len(images), 3), np.float32)
        labels = np.zeros((len(images), 3), np.int64)
        for slot, (image, (height, width)) in enumerate(zip(images, sizes, strict=True)):
            found = [
                (label, box_of_bright(image[..., channel]) / [width, height, width, height])
                for channel, label in enumerate((1, 2, 5))
                if (image[..., channel] > BRIGHT).any()
            ]
            for rank, (label, box) in enumerate(found):
                boxes[slot, rank], scores[slot, rank], labels[slot, rank] = box, SCORES[rank], label
        if self.trouble == "nan":
            boxes[:] = np.nan
        if self.trouble == "shape":
            scores = scores[:, :2]
        return RawDetections(boxes, scores, labels)

    def finish(self, outputs: RawDetections) -> RawDetections:
        return outputs

    def close(self) -> None:
        self.closed = True


def box_of_bright(channel: np.ndarray) -> np.ndarray:
    """x0, y0, x1, y1 in px of the pixels above BRIGHT in one channel [H, W]."""
    rows, columns = np.flatnonzero((channel > BRIGHT).any(1)), np.flatnonzero((channel > BRIGHT).any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)
