"""The few calls of CUDA that running an engine takes, behind one protocol; `cuda-bindings` makes them."""

import importlib
from collections.abc import Callable
from typing import Any, Protocol

from runtime.errors import CudaFailed, NotInstalled, OutOfGpuMemory

Address = int
"""Of memory, the host's or the GPU's."""
Handle = int
"""Of a stream, an event or a graph."""


class CaptureFailed(Exception):
    """The stream's work could not be made a graph; nothing of it was run."""


class Cuda(Protocol):
    """Streams, events, memory and graphs of one GPU.

    A thread names the GPU (`use`) before its first call. Each raises CudaFailed, and those that allocate
    OutOfGpuMemory.
    """

    def use(self, device: int) -> None:
        """From now on this thread's calls mean this GPU."""

    def new_stream(self) -> Handle:
        """A stream that waits for no other."""

    def free_stream(self, stream: Handle) -> None: ...

    def new_event(self) -> Handle:
        """An event, passed until it is recorded; whoever waits for it sleeps."""

    def free_event(self, event: Handle) -> None: ...

    def record(self, event: Handle, stream: Handle) -> None:
        """The event passes when what the stream has been given so far is done."""

    def hold(self, stream: Handle, event: Handle) -> None:
        """What the stream is given from now on begins after the event."""

    def await_event(self, event: Handle) -> None:
        """Wait here until the event has passed."""

    def await_stream(self, stream: Handle) -> None:
        """Wait here until the stream has nothing left to do."""

    def allocate(self, size: int) -> Address:
        """Memory of the GPU, of so many bytes, at a multiple of 256."""

    def free(self, address: Address) -> None: ...

    def allocate_host(self, size: int) -> Address:
        """Memory of the host that the GPU reads and writes by itself."""

    def free_host(self, address: Address) -> None: ...

    def to_gpu(self, target: Address, source: Address, size: int, stream: Handle) -> None:
        """Queue a copy from the host."""

    def to_host(self, target: Address, source: Address, size: int, stream: Handle) -> None:
        """Queue a copy to the host."""

    def on_gpu(self, target: Address, source: Address, size: int, stream: Handle) -> None:
        """Queue a copy from the GPU's memory to its memory."""

    def capture(self, stream: Handle, work: Callable[[], None]) -> Handle:
        """What `work` queues on the stream, as a graph; it is not run. Raises CaptureFailed."""

    def launch(self, graph: Handle, stream: Handle) -> None:
        """Queue a graph."""

    def free_graph(self, graph: Handle) -> None: ...


class BoundCuda:
    """`Cuda` by the package cuda-bindings."""

    def __init__(self) -> None:
        """Raises NotInstalled."""
        self._cuda: Any = cuda_bindings()

    def use(self, device: int) -> None:
        self._call("cudaSetDevice", device)

    def new_stream(self) -> Handle:
        return int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def free_stream(self, stream: Handle) -> None:
        self._call("cudaStreamDestroy", stream)

    def new_event(self) -> Handle:
        flags = self._cuda.cudaEventBlockingSync | self._cuda.cudaEventDisableTiming
        return int(self._call("cudaEventCreateWithFlags", flags))

    def free_event(self, event: Handle) -> None:
        self._call("cudaEventDestroy", event)

    def record(self, event: Handle, stream: Handle) -> None:
        self._call("cudaEventRecord", event, stream)

    def hold(self, stream: Handle, event: Handle) -> None:
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def await_event(self, event: Handle) -> None:
        self._call("cudaEventSynchronize", event)

    def await_stream(self, stream: Handle) -> None:
        self._call("cudaStreamSynchronize", stream)

    def allocate(self, size: int) -> Address:
        return int(self._call("cudaMalloc", size))

    def free(self, address: Address) -> None:
        self._call("cudaFree", address)

    def allocate_host(self, size: int) -> Address:
        return int(self._call("cudaHostAlloc", size, self._cuda.cudaHostAllocDefault))

    def free_host(self, address: Address) -> None:
        self._call("cudaFreeHost", address)

    def to_gpu(self, target: Address, source: Address, size: int, stream: Handle) -> None:
        self._copy(target, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def to_host(self, target: Address, source: Address, size: int, stream: Handle) -> None:
        self._copy(target, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)

    def on_gpu(self, target: Address, source: Address, size: int, stream: Handle) -> None:
        self._copy(target, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice, stream)

    def _copy(self, target: Address, source: Address, size: int, kind: Any, stream: Handle) -> None:
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def capture(self, stream: Handle, work: Callable[[], None]) -> Handle:
        # ThreadLocal: another thread copies the next batch meanwhile, which has no part in this.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        failed: Exception | None = None
        try:
            work()
        except Exception as error:  # a stream left capturing could never be used again
            failed = error
        try:
            graph = self._call("cudaStreamEndCapture", stream)
            if failed is not None:
                if int(graph):
                    self._call("cudaGraphDestroy", graph)
                raise CaptureFailed(str(failed)) from failed
            try:
                return int(self._call("cudaGraphInstantiate", graph, 0))
            finally:
                self._call("cudaGraphDestroy", graph)
        except CudaFailed as error:
            raise CaptureFailed(str(failed or error)) from error

    def launch(self, graph: Handle, stream: Handle) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def free_graph(self, graph: Handle) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> Any:
        return call(self._cuda, name, *arguments)


def cuda_bindings() -> Any:
    """The module of CUDA's runtime. Raises NotInstalled."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise NotInstalled(f"cuda-bindings cannot be loaded ({error}): pip install 'ddetr[gpu]'") from error


def call(cuda: Any, name: str, *arguments: Any) -> Any:
    """The one result of a call of CUDA, or None where it has none. Raises CudaFailed, OutOfGpuMemory."""
    status, *results = getattr(cuda, name)(*arguments)
    if status == cuda.cudaError_t.cudaSuccess:
        return results[0] if results else None
    said = cuda.cudaGetErrorString(status)[1]
    text = said.decode() if isinstance(said, bytes) else str(said)
    cuda.cudaGetLastError()  # it is told here: a kernel that looks for its own error afterwards is not to find this one
    if status == cuda.cudaError_t.cudaErrorMemoryAllocation:
        size = f" of {arguments[0] / 2**20:.0f} MiB" if name in ("cudaMalloc", "cudaHostAlloc") else ""
        raise OutOfGpuMemory(
            f"{name}{size}: {text}; set max_batch_size or engine_instances lower, or end what else uses the GPU"
        )
    raise CudaFailed(f"{name}: {status.name}: {text}")
