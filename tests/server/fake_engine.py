"""A deterministic engine: it finds what is bright, and misbehaves when told to."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
TAR = 88  # likewise, and makes it hang
LETHAL = 99  # likewise, and makes it raise from then on


@dataclass
class Inputs:
    images: Pixels
    sizes: np.ndarray
    canvas: Canvas


class FakeEngine:
    """For each class of MANIFEST the box of the pixels bright in its channel, and whatever trouble is asked for."""

    def __init__(self, manifest: Manifest = MANIFEST) -> None:
        self.manifest = manifest
        self.name = "fake"
        self.batches: list[tuple[int, Canvas]] = []  # size and canvas of each batch that was inferred
        self.prepared: list[int] = []  # sizes of the batches that were prepared
        self.threads: dict[str, set[int]] = {"prepare": set(), "infer": set()}
        self.gate = threading.Event()  # closed: `infer` waits for it
        self.gate.set()
        self.entered = threading.Semaphore(0)  # released whenever `infer` begins
        self.left = threading.Semaphore(0)  # released whenever `infer` ends
        self.trouble: str | None = None  # "raise", "nan", "shape", "exit", "prepare"
        self.on_infer: Callable[[int], None] = lambda images: None  # what else happens in `infer`, e.g. to the clock
        self.closed = False

    def prepare(self, images: Sequence[Pixels], canvas: Canvas) -> Inputs:
        self.prepared.append(len(images))
        self.threads["prepare"].add(threading.get_ident())
        if self.trouble == "prepare":
            raise RuntimeError("told to")
        return Inputs(*lay_on_canvas(images, canvas), canvas)

    def infer(self, inputs: Inputs) -> RawDetections:
        try:
            return self._infer(inputs)
        finally:
            self.left.release()

    def _infer(self, inputs: Inputs) -> RawDetections:
        images, sizes = inputs.images, inputs.sizes
        self.threads["infer"].add(threading.get_ident())
        self.batches.append((len(images), inputs.canvas))
        if holds(images, TAR):
            self.gate.clear()
        self.entered.release()
        if not self.gate.wait(timeout=30):
            raise TimeoutError("nobody opened the gate")
        self.on_infer(len(images))
        if holds(images, LETHAL):
            self.trouble = "raise"
        if self.trouble == "raise":
            raise RuntimeError("told to")
        if self.trouble == "exit":
            raise SystemExit(3)
        if holds(images, POISON):
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


class FakeEngines:
    """Opens engines, and remembers them."""

    def __init__(self) -> None:
        self.opened: list[FakeEngine] = []
        self.trouble: str | None = None  # of what is opened from now on; "open": it cannot be
        self.gate = threading.Event()  # closed: opening waits for it
        self.gate.set()

    def __call__(self) -> FakeEngine:
        if not self.gate.wait(timeout=30):
            raise TimeoutError("nobody opened the gate")
        if self.trouble == "open":
            raise OSError("no device")
        engine = FakeEngine()
        engine.trouble = self.trouble
        self.opened.append(engine)
        return engine

    def release(self) -> None:
        """Let every thread go."""
        self.gate.set()
        for engine in self.opened:
            engine.gate.set()


def holds(images: Pixels, grey: int) -> bool:
    """Whether an image of the batch begins with a pixel of exactly this grey level."""
    return any((image[0, 0] == grey).all() for image in images)


def box_of_bright(channel: np.ndarray) -> np.ndarray:
    """x0, y0, x1, y1 in px of the pixels above BRIGHT in one channel [H, W]."""
    rows, columns = np.flatnonzero((channel > BRIGHT).any(1)), np.flatnonzero((channel > BRIGHT).any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)
