"""What a batch takes of CUDA, on a GPU; and on the double, which must be as strict as the real one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import CudaFailed
from runtime.cuda import BoundCuda, CaptureFailed, Cuda
from tests.runtime.cuda_double import FakeCuda

SIZE = 1 << 20


@pytest.fixture(params=["double", pytest.param("GPU", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest) -> Iterator[Cuda]:
    cuda: Cuda = FakeCuda() if request.param == "double" else BoundCuda()
    cuda.use(0)
    yield cuda
    if isinstance(cuda, FakeCuda):
        assert (cuda.violations, cuda.left()) == ([], [])


class Way:
    """Host to GPU on one stream, within the GPU and back on another, as a session goes."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.copying, self.computing = cuda.new_stream(), cuda.new_stream()
        self.uploaded, self.answered = cuda.new_event(), cuda.new_event()
        self.sent, self.back = cuda.allocate_host(SIZE), cuda.allocate_host(SIZE)
        self.first, self.second, self.third = (cuda.allocate(SIZE) for _ in range(3))

    def view(self, address: int) -> NDArray[np.uint8]:
        return np.ctypeslib.as_array((ctypes.c_uint8 * SIZE).from_address(address))

    def send(self, value: int) -> None:
        self.view(self.sent)[:] = value
        self.cuda.to_gpu(self.first, self.sent, SIZE, self.copying)
        self.cuda.record(self.uploaded, self.copying)
        self.cuda.hold(self.computing, self.uploaded)
        self.cuda.on_gpu(self.second, self.first, SIZE, self.computing)

    def compute(self) -> None:
        self.cuda.on_gpu(self.third, self.second, SIZE, self.computing)

    def fetch(self) -> set[int]:
        self.cuda.to_host(self.back, self.third, SIZE, self.computing)
        self.cuda.record(self.answered, self.computing)
        self.cuda.await_event(self.answered)
        return set(np.unique(self.view(self.back)).tolist())

    def free(self) -> None:
        for stream in (self.copying, self.computing):
            self.cuda.await_stream(stream)
            self.cuda.free_stream(stream)
        for event in (self.uploaded, self.answered):
            self.cuda.free_event(event)
        for host in (self.sent, self.back):
            self.cuda.free_host(host)
        for gpu in (self.first, self.second, self.third):
            self.cuda.free(gpu)


@pytest.fixture
def way(cuda: Cuda) -> Iterator[Way]:
    way = Way(cuda)
    yield way
    way.free()


def test_bytes_there_and_back(way: Way) -> None:
    for value in (3, 200):
        way.send(value)
        way.compute()
        assert way.fetch() == {value}


def test_a_graph_does_what_was_captured_on_what_is_there_then(cuda: Cuda, way: Way) -> None:
    way.send(1)
    way.compute()
    assert way.fetch() == {1}
    graph = cuda.capture(way.computing, way.compute)
    way.send(2)
    assert way.fetch() == {1}, "a capture runs nothing"
    for value in (5, 6):
        way.send(value)
        cuda.launch(graph, way.computing)
        assert way.fetch() == {value}
    cuda.await_stream(way.computing)
    cuda.free_graph(graph)


def test_a_stream_whose_capture_failed_goes_on(cuda: Cuda, way: Way) -> None:
    def fail() -> None:
        way.compute()
        raise CudaFailed("told to")

    with pytest.raises(CaptureFailed, match="told to"):
        cuda.capture(way.computing, fail)
    way.send(9)
    way.compute()
    assert way.fetch() == {9}


def test_addresses_are_as_tensorrt_asks(way: Way) -> None:
    assert all(address % 256 == 0 for address in (way.first, way.second, way.third))


def test_ordinary_memory_may_be_sent_and_changed_at_once(cuda: Cuda, way: Way) -> None:
    content = np.full(SIZE, 4, np.uint8)
    cuda.to_gpu(way.second, content.ctypes.data, SIZE, way.computing)
    content[:] = 8
    way.compute()
    assert way.fetch() == {4}
