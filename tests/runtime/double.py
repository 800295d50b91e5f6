"""A double of TensorRT, and of TensorRT-RTX, on the double of CUDA: an engine that finds what is bright.

It takes the calls of the real one with the real one's arguments (`test_tensorrt.py` compares them), and holds the code
that makes them to the manual: shapes and addresses of everything before a run, profiles in the stream of the run, no
graph of a context that was not run or is changed later.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.runtime.cuda_double import JUNK
from tests.runtime.cuda_double import FakeCuda as FakeCuda
from tests.runtime.cuda_double import Violation as Violation
from tests.server.fake_engine import BRIGHT, SCORES, box_of_bright

TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
DataType = enum.Enum("DataType", ["FLOAT", "HALF", "INT32", "INT64", "UINT8"])
TensorLocation = enum.Enum("TensorLocation", ["DEVICE", "HOST"])
ExecutionContextAllocationStrategy = enum.Enum(
    "ExecutionContextAllocationStrategy", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"]
)
DynamicShapesKernelSpecializationStrategy = enum.Enum(
    "DynamicShapesKernelSpecializationStrategy", ["LAZY", "EAGER", "NONE"]
)


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


@dataclass
class Plan:
    """An engine's file: what a double of an engine is built of."""

    profiles: tuple[tuple[int, int, int], ...] = ((64, 96, 4), (96, 64, 4))  # height, width, most
    detections: int = 3
    version: str = "10.14"
    labels: tuple[int, ...] = (1, 2, 5)
    tensors: dict[str, tuple[str, str, list[int]]] = field(default_factory=dict)  # other than those of a served graph
    capturable: bool = True
    host_inputs: tuple[str, ...] = ()
    memory_bytes: int = 4096

    def write(self, path: Path) -> Path:
        path.write_bytes(json.dumps(vars(self)).encode())
        return path


class FakeTrt:
    """The module `tensorrt`, or with `rtx` TensorRT-RTX's."""

    def __init__(self, cuda: FakeCuda, version: str = "10.14", *, rtx: bool = False, plugins: bool = True) -> None:
        trt = self
        self.cuda = cuda
        self.__version__ = version
        self.alive: dict[str, int] = {}
        self.ILogger = ILogger
        self.TensorIOMode, self.DataType, self.TensorLocation = TensorIOMode, DataType, TensorLocation
        self.ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
        self.LayerInformationFormat = LayerInformationFormat
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
            self.IRuntimeCache = IRuntimeCache

        class BoundRuntime(Runtime):
            def __init__(self, logger: Any) -> None:
                super().__init__(trt, logger, plugins=plugins)

        self.Runtime = BoundRuntime

    def born(self, what: str) -> None:
        self.alive[what] = self.alive.get(what, 0) + 1

    def died(self, what: str) -> None:
        self.alive[what] -= 1


class Runtime:
    def __init__(self, trt: FakeTrt, logger: Any, *, plugins: bool) -> None:
        self._trt, self._logger = trt, logger
        self._registry = IPluginRegistry(logger, plugins)
        trt.born("runtime")

    def __del__(self) -> None:
        self._trt.died("runtime")

    def get_plugin_registry(self) -> IPluginRegistry:
        return self._registry

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        plan = Plan(**json.loads(serialized_engine))
        if plan.version != self._trt.__version__:
            self._logger.log(ILogger.Severity.ERROR, f"expecting library version {plan.version}")
            return None
        if not self._registry.loaded:
            self._trt.cuda.violate("an engine is read before its plugin is loaded")
        return ICudaEngine(self._trt, plan, self)


class IPluginRegistry:
    def __init__(self, logger: Any, works: bool) -> None:
        self._logger, self._works = logger, works
        self.loaded: list[str] = []

    def load_library(self, plugin_path: str) -> object:
        if not self._works:
            self._logger.log(ILogger.Severity.ERROR, "undefined symbol: getPluginCreators")
            return None
        self.loaded.append(plugin_path)
        return object()

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> object:
        return object() if self.loaded and (type, version, plugin_namespace) == ("MSDeformAttn", "1", "") else None


class IRuntimeCache:
    """What was compiled: the shapes that a context was made for."""

    def __init__(self) -> None:
        self._content = b""

    def deserialize(self, blob: bytes) -> bool:
        if blob.startswith(b"kernels"):
            self._content = bytes(blob)
        return blob.startswith(b"kernels")

    def serialize(self) -> bytes:
        return self._content or b"kernels, compiled here"


class IRuntimeConfig:
    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy: Any = DynamicShapesKernelSpecializationStrategy.LAZY
        self._strategy: Any = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy

    def get_execution_context_allocation_strategy(self) -> Any:
        return self._strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        return isinstance(cache, IRuntimeCache)


class LayerInformationFormat(enum.Enum):
    ONELINE = 0
    JSON = 1


class EngineInspector:
    """Tells the shapes of its context beside the engine's layers."""

    execution_context: Any = None

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        assert format is LayerInformationFormat.JSON
        shapes = {} if self.execution_context is None else self.execution_context._shapes
        outputs = [{"Name": "x", "Format/Datatype": "Half" if shapes else "N/A due to dynamic shapes"}]
        layer = {"Name": "msda", "LayerType": "PluginV3", "Outputs": outputs}
        return json.dumps({"Layers": [layer], "Bindings": [f"{name} {shape}" for name, shape in shapes.items()]})


class ICudaEngine:
    def __init__(self, trt: FakeTrt, plan: Plan, runtime: Runtime) -> None:
        self._trt, self._plan = trt, plan
        self._runtime = runtime  # the real one, too, keeps it alive
        k = plan.detections
        self._tensors: dict[str, tuple[str, str, list[int]]] = plan.tensors or {
            "images": ("INPUT", "UINT8", [-1, -1, -1, 3]),
            "sizes": ("INPUT", "INT64", [-1, 2]),
            "labels": ("OUTPUT", "INT64", [-1, k]),
            "boxes": ("OUTPUT", "FLOAT", [-1, k, 4]),
            "scores": ("OUTPUT", "FLOAT", [-1, k]),
        }
        self.device_memory_size_v2 = plan.memory_bytes
        trt.born("engine")

    def __del__(self) -> None:
        self._trt.died("engine")

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._plan.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_shape(self, name: str) -> list[int]:
        return self._tensors[name][2]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._tensors[name][1]]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode[self._tensors[name][0]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self._plan.host_inputs else TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        height, width, most = self._plan.profiles[profile_index]
        rest = (height, width, 3) if name == "images" else (2,)
        return [(count, *rest) for count in (1, most, most)]

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, strategy: Any = ExecutionContextAllocationStrategy.STATIC) -> Any:
        if isinstance(strategy, IRuntimeConfig):
            strategy = strategy.get_execution_context_allocation_strategy()
        kind = RtxExecutionContext if hasattr(self._trt, "IRuntimeCache") else IExecutionContext
        return kind(self._trt, self._plan, self, strategy)


class IExecutionContext:
    def __init__(self, trt: FakeTrt, plan: Plan, engine: ICudaEngine, strategy: Any) -> None:
        self._trt, self._cuda, self._plan = trt, trt.cuda, plan
        self._engine = engine  # which it keeps alive
        self._tensors = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        self._strategy = strategy
        self._profile: int | None = None
        self._profile_stream: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._queued = False  # since anything was set
        trt.born("context")

    def __del__(self) -> None:
        self._trt.died("context")

    def set_device_memory(self, memory: int, size: int) -> None:
        if self._strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            self._cuda.violate("memory for a context that has its own")
        if memory % 256 or size < self._plan.memory_bytes:
            self._cuda.violate(f"{size} bytes at {memory:#x} for a context that needs {self._plan.memory_bytes}")
        self._memory, self._queued = (memory, size), False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile, self._profile_stream, self._shapes = profile_index, stream_handle, {}
        self._queued = False
        self._cuda.queue(stream_handle, lambda: None, [])
        return 0 <= profile_index < len(self._plan.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._profile is None:
            self._cuda.violate("a shape before its profile")
            return False
        height, width, most = self._plan.profiles[self._profile]
        rest = (height, width, 3) if name == "images" else (2,)
        if tuple(shape[1:]) != rest or not 1 <= shape[0] <= most:
            return False
        self._shapes[name], self._queued = tuple(shape), False
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._tensors:
            return False
        if memory % 256:
            self._cuda.violate(f"{name} lies at {memory:#x}, no multiple of 256")
        self._addresses[name], self._queued = memory, False
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in ("images", "sizes") if name not in self._shapes]

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda = self._cuda
        if cuda.fails("execute_async_v3") is not None:
            return False
        if set(self._shapes) != {"images", "sizes"} or self._shapes["images"][0] != self._shapes["sizes"][0]:
            cuda.violate(f"a run with shapes {self._shapes}")
        if set(self._addresses) != set(self._tensors):
            cuda.violate(f"a run with addresses of {sorted(self._addresses)} alone")
        if self._memory is None:
            cuda.violate("a run without memory")
        if self._profile_stream != stream_handle:
            cuda.violate("a run in another stream than the profile was set in")
        if cuda.recording(stream_handle):
            if not self._plan.capturable:
                return False
            if not self._queued:
                cuda.violate("a graph of a context that was not run since it was set up")
        assert self._memory is not None
        state = self._state()
        count, height, width, _ = self._shapes["images"]
        k = self._plan.detections
        sizes = {"images": count * height * width * 3, "sizes": count * 16}
        sizes |= {"boxes": count * k * 16, "scores": count * k * 4, "labels": count * k * 8}
        reads = {name: cuda.access(self._addresses[name], sizes[name], writes=False) for name in ("images", "sizes")}
        writes = {
            name: cuda.access(self._addresses[name], sizes[name], writes=True) for name in ("boxes", "scores", "labels")
        }
        memory = cuda.access(*self._memory, writes=True)

        def work() -> None:
            if self._state() != state:
                cuda.violate("the context was changed under a graph of it")
            images = cuda.read(reads["images"]).reshape(count, height, width, 3)
            filled = cuda.read(reads["sizes"]).view(np.int64).reshape(count, 2)
            answer = dict(zip(("boxes", "scores", "labels"), bright_boxes(images, filled, k, self._plan), strict=True))
            for name, access in writes.items():
                cuda.read(access)[:] = np.ascontiguousarray(answer[name]).view(np.uint8).ravel()
            cuda.read(memory)[:] = JUNK

        cuda.queue(stream_handle, work, [*reads.values(), *writes.values(), memory])
        self._queued = True
        return True

    def _state(self) -> tuple[Any, ...]:
        return (
            self._profile,
            tuple(sorted(self._shapes.items())),
            tuple(sorted(self._addresses.items())),
            self._memory,
        )


class RtxExecutionContext(IExecutionContext):
    def is_stream_capturable(self, stream: int) -> bool:
        return self._plan.capturable


def bright_boxes(images: Any, sizes: Any, detections: int, plan: Plan) -> tuple[Any, Any, Any]:
    """For each channel the box of what is bright, as `FakeEngine` finds it."""
    boxes = np.zeros((len(images), detections, 4), np.float32)
    scores = np.zeros((len(images), detections), np.float32)
    labels = np.zeros((len(images), detections), np.int64)
    for slot, (image, (height, width)) in enumerate(zip(images, sizes, strict=True)):
        found = [
            (label, box_of_bright(image[..., channel]) / [width, height, width, height])
            for channel, label in enumerate(plan.labels)
            if (image[..., channel] > BRIGHT).any()
        ]
        for rank, (label, box) in enumerate(found):
            boxes[slot, rank], scores[slot, rank], labels[slot, rank] = box, SCORES[rank], label
    return boxes, scores, labels
