"""Our calls of CUDA against the names and arguments of cuda-bindings, and what comes of their errors."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from runtime import CudaFailed, Gpu, NoGpu, NotInstalled, OutOfGpuMemory, gpus
from runtime.cuda import BoundCuda, CaptureFailed, Cuda
from tests.conftest import has_gpu
from tests.runtime.double import FakeCuda

needs_bindings = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None,
    reason="cuda-bindings is not installed: pip install cuda-bindings",
)


Status = IntEnum(
    "Status",
    {
        "cudaSuccess": 0,
        "cudaErrorMemoryAllocation": 2,
        "cudaErrorIllegalAddress": 700,
        "cudaErrorStreamCaptureInvalidated": 901,
    },
)


class Names:
    """Any member, by its name."""

    def __getattr__(self, name: str) -> str:
        return name


class FakeBindings(ModuleType):
    """Stands for `cuda.bindings.runtime`: every call succeeds and gives the next number, unless told otherwise."""

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.cudaError_t = Status
        self.cudaMemcpyKind = self.cudaStreamCaptureMode = self.cudaDeviceAttr = Names()
        for flag in ("cudaStreamNonBlocking", "cudaEventBlockingSync", "cudaHostAllocDefault"):
            setattr(self, flag, 1)
        self.cudaEventDisableTiming = 2
        self.called: list[tuple[Any, ...]] = []
        self.failing: dict[str, Status] = {}
        self.results: dict[str, Any] = {}

    def cudaGetErrorString(self, status: Status) -> tuple[Status, bytes]:  # noqa: N802
        return Status.cudaSuccess, f"what {int(status)} means".encode()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.called.append((name, *arguments))
            return self.failing.get(name, Status.cudaSuccess), self.results.get(name, len(self.called))

        return call


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> FakeBindings:
    fake = FakeBindings()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    return fake


def call_everything(cuda: Cuda) -> None:
    cuda.use(1)
    stream, event, gpu, host = cuda.new_stream(), cuda.new_event(), cuda.allocate(512), cuda.allocate_host(512)
    cuda.to_gpu(gpu, host, 256, stream)
    cuda.on_gpu(gpu + 256, gpu, 256, stream)
    cuda.to_host(host, gpu, 256, stream)
    cuda.record(event, stream)
    cuda.hold(stream, event)
    cuda.await_event(event)
    graph = cuda.capture(stream, lambda: None)
    cuda.launch(graph, stream)
    cuda.await_stream(stream)
    cuda.free_graph(graph)
    cuda.free_host(host)
    cuda.free(gpu)
    cuda.free_event(event)
    cuda.free_stream(stream)


def test_the_double_and_the_real_one_have_the_protocols_methods() -> None:
    methods = [name for name, _ in inspect.getmembers(Cuda, inspect.isfunction) if not name.startswith("_")]
    assert len(methods) > 15
    for name in methods:
        wanted = list(inspect.signature(getattr(Cuda, name)).parameters)
        for kind in (BoundCuda, FakeCuda):
            assert list(inspect.signature(getattr(kind, name)).parameters) == wanted, f"{kind.__name__}.{name}"


def test_the_double_takes_every_call() -> None:
    cuda = FakeCuda()
    call_everything(cuda)
    assert cuda.left() == []


@needs_bindings
def test_every_call_is_one_of_cuda_bindings_with_as_many_arguments(bindings: FakeBindings) -> None:
    call_everything(BoundCuda())
    gpu = SimpleNamespace(name=b"Some GPU")
    bindings.results = {"cudaGetDeviceCount": 1, "cudaGetDeviceProperties": gpu}
    gpus()
    names = {name for name, *_ in bindings.called}
    assert len(names) > 15
    sys.modules.pop("cuda.bindings.runtime")
    real = importlib.import_module("cuda.bindings.runtime")
    for name, *arguments in bindings.called:
        signature = str(getattr(real, name).__doc__).split("\n")[0]
        inside = re.search(r"\((.*)\)", signature)
        assert inside is not None, signature
        taken = [each for each in inside.group(1).split(",") if each.strip()]
        assert len(taken) == len(arguments), f"{signature} is called with {arguments}"
    for holder, members in {
        "cudaMemcpyKind": ("cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice"),
        "cudaStreamCaptureMode": ("cudaStreamCaptureModeThreadLocal",),
        "cudaDeviceAttr": ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor"),
        "cudaError_t": ("cudaSuccess", "cudaErrorMemoryAllocation"),
    }.items():
        assert all(hasattr(getattr(real, holder), member) for member in members)
    for flag in ("cudaStreamNonBlocking", "cudaEventBlockingSync", "cudaEventDisableTiming", "cudaHostAllocDefault"):
        assert isinstance(getattr(real, flag), int)
    assert hasattr(real.cudaDeviceProp(), "name")


def test_copies_go_the_way_they_say(bindings: FakeBindings) -> None:
    cuda = BoundCuda()
    cuda.to_gpu(1, 2, 3, 4)
    cuda.to_host(1, 2, 3, 4)
    cuda.on_gpu(1, 2, 3, 4)
    ways = ["HostToDevice", "DeviceToHost", "DeviceToDevice"]
    assert bindings.called == [("cudaMemcpyAsync", 1, 2, 3, f"cudaMemcpy{way}", 4) for way in ways]


def test_an_error_has_its_name_and_meaning(bindings: FakeBindings) -> None:
    bindings.failing["cudaEventSynchronize"] = Status.cudaErrorIllegalAddress
    with pytest.raises(CudaFailed, match="cudaEventSynchronize: cudaErrorIllegalAddress: what 700 means"):
        BoundCuda().await_event(5)
    assert bindings.called[-1] == ("cudaGetLastError",), "or the plugin would take it for its own kernel's"


@pytest.mark.parametrize(("method", "call"), [("allocate", "cudaMalloc"), ("allocate_host", "cudaHostAlloc")])
def test_out_of_memory_says_how_much_and_the_way_out(bindings: FakeBindings, method: str, call: str) -> None:
    bindings.failing[call] = Status.cudaErrorMemoryAllocation
    with pytest.raises(
        OutOfGpuMemory, match=rf"{call} of 26 MiB: what 2 means; set max_batch_size or engine_instances"
    ):
        getattr(BoundCuda(), method)(26 << 20)
    assert bindings.called[-1] == ("cudaGetLastError",)


@pytest.mark.parametrize("where", ["work", "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_capture_that_fails_is_always_ended(bindings: FakeBindings, where: str) -> None:
    def work() -> None:
        if where == "work":
            raise CudaFailed("TensorRT did not queue the batch")

    bindings.failing[where] = Status.cudaErrorStreamCaptureInvalidated
    expected = CudaFailed if where == "cudaStreamBeginCapture" else CaptureFailed
    with pytest.raises(expected, match="did not queue the batch" if where == "work" else "what 901 means"):
        BoundCuda().capture(9, work)
    names = [name for name, *_ in bindings.called]
    assert ("cudaStreamEndCapture" in names) == (where != "cudaStreamBeginCapture")
    assert ("cudaGraphDestroy" in names) == (where in ("work", "cudaGraphInstantiate"))


def test_gpus_have_names_and_architectures(bindings: FakeBindings) -> None:
    gpu = SimpleNamespace(name=b"NVIDIA A100")
    bindings.results = {"cudaGetDeviceCount": 2, "cudaGetDeviceProperties": gpu, "cudaDeviceGetAttribute": 8}
    assert gpus() == [Gpu(0, "NVIDIA A100", "sm88"), Gpu(1, "NVIDIA A100", "sm88")]


def test_without_a_gpu_it_says_so(bindings: FakeBindings) -> None:
    bindings.results["cudaGetDeviceCount"] = 0
    with pytest.raises(NoGpu, match="CUDA counts none"):
        gpus()
    bindings.failing["cudaGetDeviceCount"] = Status.cudaErrorIllegalAddress
    with pytest.raises(NoGpu, match="no NVIDIA GPU can be used: cudaGetDeviceCount: cudaErrorIllegalAddress"):
        gpus()


@needs_bindings
@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_driver_the_real_bindings_say_so() -> None:
    with pytest.raises(NoGpu, match="no NVIDIA GPU can be used: cudaGetDeviceCount: cudaError"):
        gpus()


def test_without_the_bindings_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    for ask in (gpus, BoundCuda):
        with pytest.raises(NotInstalled, match=r"pip install 'ddetr\[gpu\]'"):
            ask()


@needs_bindings
@pytest.mark.skipif(has_gpu(), reason="on a GPU these calls would be made in earnest")
def test_the_real_bindings_take_every_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver every call fails, but only once its arguments are converted; ours is told that it did not."""
    real = importlib.import_module("cuda.bindings.runtime")
    refused: list[str] = []

    class Forwarding(ModuleType):
        def __getattr__(self, name: str) -> Any:
            member = getattr(real, name)
            if isinstance(member, type) or not callable(member):
                return member

            def call(*arguments: Any) -> tuple[Any, ...]:
                status, *_ = member(*arguments)
                if status != real.cudaError_t.cudaErrorInsufficientDriver:
                    refused.append(f"{name}: {status.name}")
                return real.cudaError_t.cudaSuccess, 7

            return call

    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", Forwarding("cuda.bindings.runtime"))
    call_everything(BoundCuda())
    assert [each for each in refused if "cudaErrorNoDevice" not in each] == []
