"""What runs the network: one small interface, its implementations as siblings, and the one place that picks."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bundle import Bundle, Canvas, Manifest
from server.errors import StartupError
from server.preprocess import Pixels
from server.settings import Settings

logger = logging.getLogger("ddetr.engine")


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
    the next batch is prepared while one is inferred. Before it is at work other threads, one after the other, open it,
    hold it against its bundle's proof and may try it on pictures. An engine that is handed to a service open (see
    `create_app`) is warmed again if it dies, by raising on a blank picture, or when it comes back from hanging.
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


@dataclass(frozen=True)
class Candidate:
    """One way to run a bundle here, not opened yet."""

    name: str
    precision: str  # whose limits its answers are held to: "fp32", "tf32", "fp16" or "int8"
    open: OpenEngine  # raises StartupError
    source: str = ""  # what it opens, and on which kind of device: all of that kind answer alike
    needs_proof: bool = False  # it was built: the graph alone says nothing of its answers


@dataclass(frozen=True)
class PassedOver:
    """One way that the settings allow, and why it cannot be gone here."""

    name: str
    why: str
    comes: bool = False  # it is for others to serve until it is built

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"


def candidates(settings: Settings, bundle: Bundle) -> list[Candidate]:
    """The engines that settings, bundle and machine allow, the best first; none is opened.

    Best is a TensorRT engine of the bundle for this GPU, then ONNX Runtime on the GPU, then on the CPU; without a
    precision asked for, half before float32, and 8 bits never. Where TensorRT alone is wanted, ONNX Runtime is allowed
    for as long as an engine is still to be built. Raises StartupError, saying of each why not.
    """
    ways = ways_to_run(settings, bundle)
    found = [way for way in ways if isinstance(way, Candidate)]
    if not found:
        why = "; ".join(str(way) for way in ways if isinstance(way, PassedOver))
        if any(isinstance(way, PassedOver) and way.comes for way in ways):
            why += " (device=auto would let the CPU serve until it is built)"
        elif settings.engine == "tensorrt":
            why += " (engine=auto would let ONNX Runtime serve)"
        raise StartupError(why)
    return found


def passed_over(settings: Settings, bundle: Bundle) -> tuple[str, ...]:
    """The engines that cannot be opened here, and why; those behind one that can are not named."""
    ways = ways_to_run(settings, bundle)
    first = next((index for index, way in enumerate(ways) if isinstance(way, Candidate)), len(ways))
    return tuple(str(way) for way in ways[:first])


def open_engine(settings: Settings, bundle: Bundle) -> Engine:
    """The first of `candidates` that opens; the log says which, and why not those before it.

    Raises StartupError with what is wrong with each.
    """
    for why in passed_over(settings, bundle):
        logger.info("passed over %s", why)
    failed = []
    for candidate in candidates(settings, bundle):
        try:
            return candidate.open()
        except StartupError as error:
            failed.append(str(error))
            logger.warning("passed over %s: %s", candidate.name, error)
    raise StartupError("; ".join(failed))


def placements(settings: Settings) -> list[Settings]:
    """The settings of every engine: `engine_instances` on each device asked for, `device` the one it is on.

    Neighbours are on different devices. Raises StartupError where `all` finds no GPU.
    """
    devices = [name.strip() for name in settings.device.split(",")]
    if devices == ["all"]:
        from runtime import RuntimeUnavailable, gpus

        try:
            devices = [f"cuda:{gpu.index}" for gpu in gpus()]
        except RuntimeUnavailable as error:
            raise StartupError(f"device 'all': {error}") from error
    each = [settings.model_copy(update={"device": device}) for device in dict.fromkeys(devices)]
    return [one for _ in range(settings.engine_instances) for one in each]


def ways_to_run(settings: Settings, bundle: Bundle) -> list[Candidate | PassedOver]:
    """Every way that the settings allow, in order of preference."""
    ways: list[Candidate | PassedOver] = []
    if settings.engine in ("auto", "tensorrt"):
        if settings.device != "cpu":
            from server.tensorrt_engine import tensorrt_ways  # only what may be used is imported

            ways += tensorrt_ways(settings, bundle)
        elif settings.engine == "tensorrt":
            ways.append(PassedOver("tensorrt", "it runs on NVIDIA GPUs, and device is 'cpu'"))
    comes = any(isinstance(way, PassedOver) and way.comes for way in ways)
    if comes or settings.engine in ("auto", "onnxruntime"):
        from server.onnxruntime_engine import onnxruntime_ways

        ways += onnxruntime_ways(settings, bundle)
    return ways


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
