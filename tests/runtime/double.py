"""Doubles of CUDA and of TensorRT that do what they are told as late as they may, and check that it was right to.

Nothing that is queued happens before somebody waits for it: whoever reads too early reads junk, and whoever writes too
early is copied in place of what should have been. Every byte that is read or written is held against who wrote or read
it before: without an event or a stream between the two, that is a violation. So is whatever the manuals of CUDA and
TensorRT forbid and a GPU would punish with wrong boxes, or not at all.
"""

from __future__ import annotations

import ctypes
import enum
import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtime.cuda import CaptureFailed
from tests.server.fake_engine import BRIGHT, SCORES, box_of_bright

JUNK = 0xA5


class Violation(BaseException):
    """A rule of CUDA or TensorRT was broken. No Exception: the code under test is not to survive it."""


@dataclass(eq=False)
class Access:
    """Bytes that an operation reads or writes."""

    block: Block
    begin: int
    end: int
    writes: bool
    by: Operation | None = None


@dataclass(eq=False)
class Block:
    """Memory that was asked for."""

    address: int
    content: np.ndarray[Any, np.dtype[np.uint8]]
    kind: str  # "GPU", "pinned"
    accesses: list[Access] = field(default_factory=list)


@dataclass(eq=False)
class Operation:
    """Something a stream has been given."""

    work: Callable[[], None]
    stream: int
    after: list[Operation]
    clock: dict[int, int]  # stream -> how many of its operations are done before this one begins, and itself
    accesses: list[Access]
    done: bool = False

    def follows(self, other: Operation) -> bool:
        return self.clock.get(other.stream, 0) >= other.clock[other.stream]


@dataclass(eq=False)
class Stream:
    queue: deque[Operation] = field(default_factory=deque)
    last: Operation | None = None
    given: int = 0
    holds: list[Operation] = field(default_factory=list)
    recording: list[tuple[Callable[[], None], list[Access]]] | None = None


class FakeCuda:
    """`runtime.cuda.Cuda` without a GPU."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._failing: dict[str, tuple[Exception, int]] = {}
        self._broken: tuple[int | None, str, Exception | None] = (None, "", None)
        self.violations: list[str] = []
        self.graphs_launched = 0
        self._lock = threading.RLock()  # one call at a time
        self._thread = threading.local()
        self._blocks: dict[int, Block] = {}
        self._streams: dict[int, Stream] = {}
        self._events: dict[int, Operation | None] = {}
        self._graphs: dict[int, list[tuple[Callable[[], None], list[Access]]]] = {}
        self._launched: dict[int, Operation] = {}  # the newest of each graph
        self._next_address = 0x7000_0000_0000
        self._next_handle = 100
        self._host_clock: dict[int, int] = {}

    # --- what the runtime calls ---

    def use(self, device: int) -> None:
        self._thread.device = device

    def new_stream(self) -> int:
        self._begin("new_stream")
        return self._keep(self._streams, Stream())

    def free_stream(self, stream: int) -> None:
        self._begin("free_stream")
        if self._stream(stream).queue:
            self.violate(f"stream {stream} is freed with work waiting")
        del self._streams[stream]

    def new_event(self) -> int:
        self._begin("new_event")
        return self._keep(self._events, None)

    def free_event(self, event: int) -> None:
        self._begin("free_event")
        self._event(event)
        del self._events[event]

    def record(self, event: int, stream: int) -> None:
        self._begin("record")
        self._event(event)
        given = self._stream(stream)
        if given.recording is not None:
            self.violate("an event is recorded in a stream that is captured")
        self._events[event] = self._give(stream, lambda: None, [])

    def hold(self, stream: int, event: int) -> None:
        self._begin("hold")
        recorded = self._event(event)
        if self._stream(stream).recording is not None:
            self.violate("a stream that is captured waits for an event of outside")
        if recorded is not None:
            self._streams[stream].holds.append(recorded)

    def await_event(self, event: int) -> None:
        self._begin("await_event", waits=True)
        recorded = self._event(event)
        if recorded is not None:
            self._run_until(recorded)

    def await_stream(self, stream: int) -> None:
        self._begin("await_stream", waits=True)
        last = self._stream(stream).last
        if last is not None:
            self._run_until(last)

    def allocate(self, size: int) -> int:
        self._begin("allocate", waits=True)
        return self._block(np.full(size, JUNK, np.uint8), "GPU")

    def free(self, address: int) -> None:
        self._begin("free", waits=True)
        self._free(address, "GPU")

    def allocate_host(self, size: int) -> int:
        self._begin("allocate_host", waits=True)
        return self._block(np.full(size, JUNK, np.uint8), "pinned")

    def free_host(self, address: int) -> None:
        self._begin("free_host", waits=True)
        self._free(address, "pinned")

    def to_gpu(self, target: int, source: int, size: int, stream: int) -> None:
        self._begin("to_gpu")
        there = self.access(target, size, writes=True, kind="GPU")
        if self._holder(source) is None:  # ordinary memory: read before the call returns
            content = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(source)).copy()
            self._give(stream, lambda: self._write(there, content), [there])
        else:
            self._copy(there, self.access(source, size, writes=False, kind="pinned"), stream)

    def to_host(self, target: int, source: int, size: int, stream: int) -> None:
        self._begin("to_host")
        there = self.access(target, size, writes=True, kind="pinned")
        self._copy(there, self.access(source, size, writes=False, kind="GPU"), stream)

    def on_gpu(self, target: int, source: int, size: int, stream: int) -> None:
        self._begin("on_gpu")
        there = self.access(target, size, writes=True, kind="GPU")
        self._copy(there, self.access(source, size, writes=False, kind="GPU"), stream)

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        self._begin("capture")
        given = self._stream(stream)
        given.recording = []
        self._thread.capturing = True
        try:
            work()
        except Exception as error:
            raise CaptureFailed(str(error)) from error
        finally:
            self._thread.capturing = False
            recorded, given.recording = given.recording, None
        return self._keep(self._graphs, recorded)

    def launch(self, graph: int, stream: int) -> None:
        self._begin("launch")
        if graph not in self._graphs:
            self.violate(f"graph {graph} is not there")
        self.graphs_launched += 1
        for work, accesses in self._graphs[graph]:
            fresh = [Access(each.block, each.begin, each.end, each.writes) for each in accesses]
            self._launched[graph] = self._give(stream, work, fresh)

    def free_graph(self, graph: int) -> None:
        self._begin("free_graph")
        if self._graphs.pop(graph, None) is None:
            self.violate(f"graph {graph} is freed, and not there")
        if graph in self._launched and not self._launched.pop(graph).done:
            self.violate(f"graph {graph} is freed while it runs")

    # --- what TensorRT's double and the tests call ---

    def fail(self, call: str, error: Exception, nth: int) -> None:
        """The nth call of this name from now on raises, once."""
        self._failing[call] = (error, nth)

    def fail_on(self, device: int | None, call: str, error: Exception | None) -> None:
        """Every call of this name from a thread that works on this GPU raises, from now on."""
        self._broken = (device, call, error)

    def fails(self, call: str) -> Exception | None:
        """What this call raises."""
        device, name, broken = self._broken
        if device is not None and (device, name) == (getattr(self._thread, "device", None), call):
            return broken
        error, left = self._failing.pop(call, (None, 0))
        if error is not None and left > 1:
            self._failing[call] = (error, left - 1)
        return error if left == 1 else None

    def queue(self, stream: int, work: Callable[[], None], accesses: list[Access]) -> None:
        """Work of a library on a stream."""
        self._give(stream, work, accesses)

    def recording(self, stream: int) -> bool:
        return self._stream(stream).recording is not None

    def access(self, address: int, size: int, *, writes: bool, kind: str = "GPU") -> Access:
        """These bytes, all of one block of this kind."""
        block = self._holder(address)
        if block is None or block.kind != kind:
            self.violate(f"{address:#x} is no {kind} memory that is held")
            raise AssertionError
        begin = address - block.address
        if begin + size > len(block.content):
            self.violate(f"{size} bytes from {begin} on, of {kind} memory of {len(block.content)}")
        return Access(block, begin, begin + size, writes)

    def read(self, access: Access) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return access.block.content[access.begin : access.end]

    def left(self) -> list[str]:
        """What was not given back."""
        kinds = {"streams": self._streams, "events": self._events, "graphs": self._graphs, "blocks": self._blocks}
        return [f"{len(held)} {name}" for name, held in kinds.items() if held]

    def violate(self, what: str) -> None:
        self.violations.append(what)
        raise Violation(what)

    # --- inside ---

    def _begin(self, name: str, *, waits: bool = False) -> None:
        self.calls.append(name)
        if getattr(self._thread, "device", None) is None:
            self.violate(f"{name} in a thread that has not named its GPU")
        if waits and getattr(self._thread, "capturing", False):
            self.violate(f"{name} while a graph is captured")
        if (error := self.fails(name)) is not None:
            raise error

    def _keep(self, where: dict[int, Any], what: Any) -> int:
        with self._lock:
            self._next_handle += 1
            where[self._next_handle] = what
            return self._next_handle

    def _stream(self, stream: int) -> Stream:
        if stream not in self._streams:
            self.violate(f"stream {stream} is not there")
        return self._streams[stream]

    def _event(self, event: int) -> Operation | None:
        if event not in self._events:
            self.violate(f"event {event} is not there")
        return self._events[event]

    def _block(self, content: np.ndarray[Any, np.dtype[np.uint8]], kind: str) -> int:
        with self._lock:
            if kind == "pinned":
                address = content.ctypes.data
            else:
                address = self._next_address
                self._next_address += -(-len(content) // 4096) * 4096 + 4096  # never side by side
            self._blocks[address] = Block(address, content, kind)
            return address

    def _holder(self, address: int) -> Block | None:
        blocks = list(self._blocks.values())
        return next((b for b in blocks if b.address <= address < b.address + max(1, len(b.content))), None)

    def _free(self, address: int, kind: str) -> None:
        block = self._blocks.get(address)
        if block is None or block.kind != kind:
            self.violate(f"{address:#x} is freed as {kind} memory, and is none")
            return
        if any(access.by is not None and not access.by.done for access in block.accesses):
            self.violate(f"{kind} memory is freed while an operation on it is under way")
        del self._blocks[address]

    def _copy(self, target: Access, source: Access, stream: int) -> None:
        self._give(stream, lambda: self._write(target, self.read(source)), [target, source])

    def _write(self, target: Access, content: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self.read(target)[:] = content

    def _give(self, stream: int, work: Callable[[], None], accesses: list[Access]) -> Operation:
        with self._lock:
            given = self._stream(stream)
            if given.recording is not None:
                given.recording.append((work, accesses))
                return Operation(work, stream, [], {stream: 0}, [], done=True)
            before = [*given.holds, *([given.last] if given.last is not None else [])]
            clock = dict(self._host_clock)
            for each in before:
                for other, count in each.clock.items():
                    clock[other] = max(clock.get(other, 0), count)
            given.given += 1
            clock[stream] = given.given
            operation = Operation(work, stream, before, clock, accesses)
            for access in accesses:
                self._check(operation, access)
            given.queue.append(operation)
            given.last, given.holds = operation, []
            return operation

    def _check(self, operation: Operation, access: Access) -> None:
        for other in access.block.accesses:
            apart = other.end <= access.begin or access.end <= other.begin
            if apart or not (other.writes or access.writes) or other.by is None or operation.follows(other.by):
                continue
            verbs = [("writes" if each.writes else "reads") for each in (access, other)]
            self.violate(f"stream {operation.stream} {verbs[0]} what stream {other.by.stream} {verbs[1]}, unordered")
        access.by = operation
        access.block.accesses = [*access.block.accesses[-40:], access]

    def _run_until(self, operation: Operation) -> None:
        with self._lock:
            self._run(operation)
            for stream, count in operation.clock.items():
                self._host_clock[stream] = max(self._host_clock.get(stream, 0), count)

    def _run(self, operation: Operation) -> None:
        if operation.done:
            return
        queue = self._streams[operation.stream].queue
        while not operation.done:
            first = queue[0]
            for each in first.after:
                self._run(each)
            first.work()
            first.done = True
            first.work, first.after = _nothing, []
            queue.popleft()


def _nothing() -> None:
    pass


# --- TensorRT ---------------------------------------------------------------------------------------------------------

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
    pass


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
