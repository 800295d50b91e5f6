"""What runs the network: one small interface, its implementations as siblings, and the one place that picks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bundle import Bundle, Canvas, Manifest
from server.errors import StartupError
from server.preprocess import Pixels
from server.settings import Settings


@dataclass(frozen=True, eq=False)
class RawDetections:
    """A batch's answer as the served graph gives it, in descending score."""

    boxes: NDArray[np.float32]  # [N, K, 4] x0, y0, x1, y1 in 0..1 of the image; may stick out a little
    scores: NDArray[np.float32]  # [N, K]
    labels: NDArray[np.int64]  # [N, K] category ids

    def of_slot(self, slot: int) -> "RawImageDetections":
        """The part of one image."""
        return RawImageDetections(self.boxes[slot], self.scores[slot], self.labels[slot])


@dataclass(frozen=True, eq=False)
class RawImageDetections:
    """One image's part of a batch's answer."""

    boxes: NDArray[np.float32]  # [K, 4] x0, y0, x1, y1 in 0..1 of the image
    scores: NDArray[np.float32]  # [K]
    labels: NDArray[np.int64]  # [K]


class Engine(Protocol):
    """Runs one batch at a time; its three verbs are called in this order.

    `infer` and `finish` are called from one thread that is the engine's own, and so is `prepare`, but from another one:
    the next batch is prepared while one is inferred. An engine that is handed to a service open (see `create_app`) is
    warmed again if it dies, by raising on a blank picture, or when it comes back from hanging.
    """

    @property
    def name(self) -> str:
        """For people: what runs, and on what."""

    @property
    def manifest(self) -> Manifest:
        """Of the bundle that the engine was opened from."""

    def prepare(self, images: Sequence[Pixels], canvas: Canvas) -> Any:
        """Lay the images on the canvas, where the engine wants them."""

    def infer(self, inputs: Any) -> Any:
        """Run the network on what `prepare` gave."""

    def finish(self, outputs: Any) -> RawDetections:
        """Bring the answer of `infer` back."""

    def close(self) -> None:
        """Give back what the engine holds; it is not called again."""


OpenEngine = Callable[[], Engine]


def run_engine(engine: Engine, images: Sequence[Pixels], canvas: Canvas) -> RawDetections:
    """One batch through `engine`. Raises ValueError for an answer that cannot be one."""
    raw = engine.finish(engine.infer(engine.prepare(images, canvas)))
    check_answer(raw, len(images))
    return raw


def open_engine(settings: Settings, bundle: Bundle) -> Engine:
    """One engine of the kind that the settings ask for: `auto` takes the first that this machine and bundle have.

    Raises StartupError, saying what is missing.
    """
    if settings.engine == "tensorrt":
        raise StartupError("engine 'tensorrt' is not part of this build; set engine to 'onnxruntime' or 'auto'")
    from server.onnxruntime_engine import OnnxRuntimeEngine  # only the engine in use is imported

    return OnnxRuntimeEngine(bundle, settings)


def check_answer(raw: RawDetections, batch_size: int) -> None:
    """Raises ValueError for an answer that cannot be one."""
    detections = raw.scores.shape[1] if raw.scores.ndim == 2 else 0
    expected = {
        "boxes": (batch_size, detections, 4),
        "scores": (batch_size, detections),
        "labels": (batch_size, detections),
    }
    for name, shape in expected.items():
        found = getattr(raw, name).shape
        if found != shape:
            raise ValueError(f"the engine's {name} have shape {list(found)}, expected {list(shape)}")
    # One pass: a sum is finite only if no value is NaN or infinite (scores are in 0..1, boxes near it).
    if not np.isfinite(raw.boxes.sum() + raw.scores.sum()):
        raise ValueError("the engine's answer holds values that are not finite")
