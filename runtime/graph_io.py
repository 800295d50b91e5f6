"""What an engine of a served graph takes and gives, and how a batch of it lies in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.errors import EngineRefused

ALIGNMENT = 256
"""Of every part of a block: what TensorRT asks for."""

# Name to TensorRT's name of the type, numpy's, and the axes: N the batch, K the detections, or a number.
_TENSORS: dict[str, tuple[str, str, Any, tuple[str | int, ...]]] = {
    "images": ("INPUT", "UINT8", np.uint8, ("N", "H", "W", 3)),
    "sizes": ("INPUT", "INT64", np.int64, ("N", 2)),
    "boxes": ("OUTPUT", "FLOAT", np.float32, ("N", "K", 4)),
    "scores": ("OUTPUT", "FLOAT", np.float32, ("N", "K")),
    "labels": ("OUTPUT", "INT64", np.int64, ("N", "K")),
}


@dataclass(frozen=True)
class Profile:
    """The batches of one canvas: of 1 to `most` images."""

    index: int
    height: int
    width: int
    most: int


@dataclass(frozen=True)
class Part:
    """Where a tensor lies in a block: `axes` behind the batch, which begins at `offset` bytes."""

    offset: int
    dtype: np.dtype[Any]
    axes: tuple[int, ...]

    def size(self, count: int) -> int:
        """Bytes of a batch of `count`."""
        return int(count * self.dtype.itemsize * np.prod(self.axes, dtype=np.int64))


@dataclass(frozen=True)
class GraphIo:
    """Read from an engine: nothing about it is guessed."""

    profiles: tuple[Profile, ...]
    detections: int  # K

    @property
    def most(self) -> int:
        """The largest batch of any profile."""
        return max(profile.most for profile in self.profiles)

    def inputs(self, height: int, width: int) -> tuple[Mapping[str, Part], int]:
        """The parts of a batch on this canvas, and the bytes of the largest. One copy brings all."""
        # The sizes lie first, and take as much room in every batch: images begin at one address, whatever they are.
        sizes = Part(0, np.dtype(np.int64), (2,))
        images = Part(aligned(sizes.size(self.most)), np.dtype(np.uint8), (height, width, 3))
        most = max((p.most for p in self.profiles if (p.height, p.width) == (height, width)), default=self.most)
        return {"sizes": sizes, "images": images}, images.offset + images.size(most)

    def outputs(self) -> tuple[Mapping[str, Part], int]:
        """The parts of an answer, and its bytes."""
        parts, end = {}, 0
        for name in ("boxes", "scores", "labels"):
            axes = (self.detections, 4) if name == "boxes" else (self.detections,)
            parts[name] = Part(end, np.dtype(_TENSORS[name][2]), axes)
            end = aligned(end + parts[name].size(self.most))
        return parts, end

    @property
    def input_bytes(self) -> int:
        """Of the largest batch on the largest canvas."""
        return max(self.inputs(profile.height, profile.width)[1] for profile in self.profiles)


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def read_graph_io(engine: Any, trt: Any) -> GraphIo:
    """What an ICudaEngine takes and gives. Raises EngineRefused where that is not what a served graph does."""
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    if names != set(_TENSORS):
        raise EngineRefused(
            f"the engine has the tensors {', '.join(sorted(names))}; one of a bundle has {', '.join(sorted(_TENSORS))}"
        )
    detections = 0
    for name, (mode, dtype, _, axes) in _TENSORS.items():
        shape = tuple(engine.get_tensor_shape(name))
        found = (engine.get_tensor_mode(name).name, engine.get_tensor_dtype(name).name)
        fits = len(shape) == len(axes) and all(
            size == axis or (isinstance(axis, str) and size == -1) or (axis == "K" and size > 0)
            for size, axis in zip(shape, axes, strict=True)
        )
        if found != (mode, dtype) or not fits:
            raise EngineRefused(
                f"the engine's {name} is {' '.join(found)} {list(shape)}; expected {mode} {dtype} [{_join(axes)}]"
            )
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise EngineRefused(f"the engine wants its {name} in the host's memory; build it again")
        if name == "boxes":
            detections = shape[1]
    if detections < 1:
        raise EngineRefused("the engine does not tell how many detections it gives an image; build it again")
    return GraphIo(tuple(_profile(engine, index) for index in range(engine.num_optimization_profiles)), detections)


def _profile(engine: Any, index: int) -> Profile:
    smallest, _, largest = (tuple(shape) for shape in engine.get_tensor_profile_shape("images", index))
    most_sizes = tuple(engine.get_tensor_profile_shape("sizes", index)[2])[0]
    if smallest[1:] != largest[1:] or smallest[0] != 1:
        raise EngineRefused(
            f"profile {index} of the engine is for images {list(smallest)} to {list(largest)}; expected batches from 1 "
            "on, all of one canvas"
        )
    return Profile(index, largest[1], largest[2], min(largest[0], most_sizes))


def _join(axes: tuple[str | int, ...]) -> str:
    return ", ".join(map(str, axes))
