from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime import Gpu, TensorRTSession
from runtime.tensorrt import open_on
from tests.runtime.double import FakeCuda, FakeTrt, Plan

GPU = Gpu(0, "Double", "sm80")

Open = Callable[..., TensorRTSession]


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    cuda = FakeCuda()
    yield cuda
    assert cuda.violations == []


@pytest.fixture(params=["tensorrt", "rtx"])
def trt(request: pytest.FixtureRequest, cuda: FakeCuda) -> FakeTrt:
    return FakeTrt(cuda, rtx=request.param == "rtx")


@pytest.fixture
def open_session(cuda: FakeCuda, trt: FakeTrt, tmp_path: Path) -> Iterator[Open]:
    """Opens sessions, and looks at the end that they gave everything back."""
    sessions: list[TensorRTSession] = []

    def open_one(plan: Plan | None = None, **options: Any) -> TensorRTSession:
        path = (plan or Plan()).write(tmp_path / "model.engine")
        sessions.append(open_on(GPU, path, "tensorrt", trt, cuda, tmp_path / "plugin.so", **options))
        return sessions[-1]

    yield open_one
    for session in sessions:
        session.close()
    gc.collect()
    assert cuda.left() == []
    assert {what: count for what, count in trt.alive.items() if count} == {}
