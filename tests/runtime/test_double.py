"""The doubles notice: each step of a session that is left out, or out of place, is a violation or a wrong answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import TensorRTSession
from runtime.tensorrt import open_on
from tests.runtime.conftest import GPU
from tests.runtime.double import FakeCuda, FakeTrt, IExecutionContext, Plan, Violation
from tests.runtime.smears import batch, check


def opened(cuda: FakeCuda, tmp_path: Path) -> TensorRTSession:
    path = Plan().write(tmp_path / "model.engine")
    return open_on(GPU, path, "tensorrt", FakeTrt(cuda), cuda, tmp_path / "plugin.so")


def work(session: TensorRTSession) -> None:
    """Batches one behind the other, as the server runs them."""
    batches = [batch(seed, 1 + seed % 2) for seed in range(8)]
    ahead = None
    for index, given in enumerate(batches):
        ready, ahead = ahead or put(session, given), None
        running = session.run(ready)
        if index + 1 < len(batches):
            ahead = put(session, batches[index + 1])
        check(session.fetch(running), given)


def close_with_a_batch_under_way(session: TensorRTSession) -> None:
    put(session, batch(0, 1))
    session.close()


def put(session: TensorRTSession, given: Any) -> Any:
    staged = session.stage(len(given[0]), 64, 96)
    staged.images[...], staged.sizes[...] = given
    session.upload(staged)
    return staged


def test_the_work_is_right_as_it_is(cuda: FakeCuda, tmp_path: Path) -> None:
    session = opened(cuda, tmp_path)
    work(session)
    session.close()
    assert cuda.left() == []


@pytest.mark.parametrize(
    "call", ["record", "hold", "await_event", "to_gpu", "on_gpu", "to_host", "launch", "await_stream"]
)
def test_a_call_that_is_left_out_is_noticed(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    session = opened(cuda, tmp_path)
    monkeypatch.setattr(cuda, call, lambda *_: None)
    with pytest.raises((Violation, AssertionError)):
        (close_with_a_batch_under_way if call == "await_stream" else work)(session)


@pytest.mark.parametrize("name", ["images", "sizes", "boxes", "scores", "labels"])
def test_a_tensor_without_an_address_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_address = IExecutionContext.set_tensor_address
    monkeypatch.setattr(
        IExecutionContext, "set_tensor_address", lambda self, n, m: True if n == name else set_address(self, n, m)
    )
    with pytest.raises(Violation, match="a run with addresses of"):
        work(opened(FakeCuda(), tmp_path))


def test_addresses_that_were_swapped_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"images": "sizes", "sizes": "images"}
    set_address = IExecutionContext.set_tensor_address
    monkeypatch.setattr(
        IExecutionContext, "set_tensor_address", lambda self, n, m: set_address(self, other.get(n, n), m)
    )
    with pytest.raises((Violation, AssertionError, RuntimeWarning)):  # sizes of 0
        work(opened(FakeCuda(), tmp_path))


def change(what: str) -> Callable[[FakeCuda, FakeTrt, Any, int], None]:
    """Something that must not be done to a context whose graph is kept."""

    def do(cuda: FakeCuda, trt: FakeTrt, context: Any, stream: int) -> None:
        if what == "shape":
            context.set_input_shape("images", (2, 64, 96, 3))
        elif what == "address":
            context.set_tensor_address("images", cuda.allocate(10_000_000))
        else:
            context.set_optimization_profile_async(1, stream)

    return do


@pytest.mark.parametrize("what", ["shape", "address", "profile"])
def test_a_context_changed_under_its_graph_is_noticed(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda()
    contexts: list[Any] = []
    born = IExecutionContext.__init__
    monkeypatch.setattr(IExecutionContext, "__init__", lambda self, *rest: contexts.append(self) or born(self, *rest))
    session = opened(cuda, tmp_path)
    for _ in range(2):
        session.infer(*batch(0, 1))
    change(what)(cuda, FakeTrt(cuda), contexts[0], next(iter(cuda._streams)))
    with pytest.raises(Violation, match="changed under a graph"):
        session.infer(*batch(0, 1))


def test_what_is_read_too_early_is_junk(tmp_path: Path) -> None:
    cuda = FakeCuda()
    cuda.use(0)
    stream, host, gpu = cuda.new_stream(), cuda.allocate_host(256), cuda.allocate(256)
    cuda.to_host(host, gpu, 256, stream)
    source = np.ones(256, np.uint8)
    cuda.to_gpu(gpu, source.ctypes.data, 256, stream)
    source[:] = 7  # ordinary memory is read at once
    back = cuda.allocate_host(256)
    cuda.to_host(back, gpu, 256, stream)
    content = cuda.read(cuda.access(back, 256, writes=False, kind="pinned"))
    assert set(content) == {0xA5}
    cuda.await_stream(stream)
    assert set(content) == {1}


def test_two_streams_without_an_event_between_them(tmp_path: Path) -> None:
    cuda = FakeCuda()
    cuda.use(0)
    first, second, event = cuda.new_stream(), cuda.new_stream(), cuda.new_event()
    host, back, gpu = cuda.allocate_host(512), cuda.allocate_host(256), cuda.allocate(256)
    cuda.to_gpu(gpu, host, 256, first)
    with pytest.raises(Violation, match="stream .* reads what stream .* writes, unordered"):
        cuda.to_host(back, gpu, 256, second)
    cuda.record(event, first)
    cuda.hold(second, event)
    cuda.on_gpu(gpu + 128, gpu, 128, second)
    with pytest.raises(Violation, match="freed while an operation on it is under way"):
        cuda.free(gpu)
    with pytest.raises(Violation, match="300 bytes from 0 on, of GPU memory of 256"):
        cuda.to_gpu(gpu, host, 300, first)
