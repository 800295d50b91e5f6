"""A double of CUDA that does what it is told as late as it may, and checks that it was right to.

Nothing that is queued happens before somebody waits for it: whoever reads too early reads junk, and whoever writes too
early is copied in place of what should have been. Every byte that is read or written is held against who wrote or read
it before: without an event or a stream between the two, that is a violation. So is whatever CUDA's manual forbids
and a GPU would punish with wrong boxes, or not at all.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.cuda import CaptureFailed

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
