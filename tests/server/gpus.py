"""GPUs, TensorRT and engines in a bundle, all of them doubles."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bundle import Bundle, Canvas, EngineProfile, EngineRecord, write_bundle
from bundle.reader import sha256_of
from runtime import Gpu, TensorRTSession
from runtime.tensorrt import open_on
from tests.runtime.double import FakeCuda, FakeTrt, Plan
from tests.server.fake_engine import MANIFEST
from tests.server.tiny_bundle import tiny_model

CANVASES = MANIFEST.canvases


class Gpus:
    """What the server finds, and what it opened on it."""

    def __init__(self, *arch: str) -> None:
        self.gpus = [Gpu(index, f"Double {index}", each) for index, each in enumerate(arch)]
        self.cuda = FakeCuda()
        self.trt = {"tensorrt": FakeTrt(self.cuda), "rtx": FakeTrt(self.cuda, rtx=True)}
        self.opened: list[tuple[str, int]] = []  # file and GPU

    def open(
        self, path: Path, flavour: str, device: int, plugin: Path | None, built_with: str = "", **options: Any
    ) -> TensorRTSession:
        self.opened.append((path.name, device))
        plugin = plugin or Path("plugin.so")
        return open_on(self.gpus[device], path, flavour, self.trt[flavour], self.cuda, plugin, built_with, **options)

    def left(self) -> list[str]:
        """What is held on GPUs once engines have been closed, which their own threads do."""
        until_s = time.monotonic() + 30
        while (held := self.cuda.left()) and time.monotonic() < until_s:
            threading.Event().wait(0.005)
        return held


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch, *arch: str) -> Iterator[Gpus]:
    """A machine with these GPUs. At the end: no rule was broken."""
    gpus = Gpus(*arch)
    monkeypatch.setattr("server.tensorrt_engine.gpus", lambda: gpus.gpus)
    monkeypatch.setattr("runtime.gpus", lambda: gpus.gpus)
    monkeypatch.setattr("server.tensorrt_engine.open_tensorrt", gpus.open)
    monkeypatch.setattr("server.tensorrt_engine.load_flavour", lambda flavour: gpus.trt[flavour])
    yield gpus
    assert gpus.cuda.violations == []


def engine_record(
    file: str, content: Path, most: int = 4, canvases: tuple[Canvas, ...] = CANVASES, version: str = "10.14"
) -> EngineRecord:
    """Of an engine's file named as bundles name them: flavour, architecture, precision."""
    flavour, arch, precision = file.removesuffix(".engine").rsplit("-", 2)
    return EngineRecord(
        file=file,
        flavour="rtx" if flavour == "rtx" else "tensorrt",
        arch=arch,
        precision=precision,
        sha256=sha256_of(content),
        built_with={flavour: version},
        profiles=tuple(EngineProfile(canvas=each, typical_batch_size=1, max_batch_size=most) for each in canvases),
    )


def bundle_with(
    folder: Path, *files: str, plan: Plan | None = None, most: int = 4, version: str = "10.14", proof: bytes = b""
) -> Bundle:
    """A bundle of the tiny network with engines of these names; each finds what is bright, as the fake engine does."""
    profiles = tuple((canvas.height, canvas.width, most) for canvas in reversed(CANVASES))
    plan = plan or Plan(profiles=profiles)
    with tempfile.TemporaryDirectory() as temporary:
        path = plan.write(Path(temporary) / "engine")
        records = tuple(engine_record(file, path, most, version=version) for file in files)
        manifest = MANIFEST.model_copy(update={"engines": records})
        content: dict[str, Path | bytes] = {"model.onnx": tiny_model().SerializeToString()}
        content |= {"proof.npz": proof} if proof else {}
        return write_bundle(folder, manifest, content | dict.fromkeys(files, path))
