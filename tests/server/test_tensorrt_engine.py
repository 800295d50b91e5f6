"""TensorRT engines in the server, on doubles of CUDA and TensorRT, which check all they are asked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from bundle import Bundle
from parity.proof import proof_bytes
from runtime import CudaFailed, NoGpu, OutOfGpuMemory
from server.app import create_app
from server.engine import Candidate, candidates, open_engine, passed_over, placements, run_engine
from server.errors import ParityFailed, StartupError
from server.gate import open_proven
from server.metrics import Metrics
from server.settings import Settings
from server.tensorrt_engine import TensorRTEngine
from tests.runtime.double import Plan
from tests.server.fake_engine import FakeEngine
from tests.server.gpus import CANVASES, Gpus, bundle_with, installed
from tests.server.pictures import BOX, GREEN, RED, encode, rectangle
from tests.server.proofs import proof_by

SM80 = "tensorrt-sm80-fp16.engine"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    with installed(monkeypatch, "sm80", "sm80", "sm86") as gpus:
        yield gpus


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_with(tmp_path_factory.mktemp("bundles") / "one", SM80)


def settings_for(bundle: Bundle, **values: object) -> Settings:
    """Without a proof only an open gate lets them in."""
    fixed: dict[str, object] = {"stall_timeout_ms": 60_000, "engine_cache": bundle.path.parent / "cache", "gate": False}
    return Settings(bundle=bundle.path, **(fixed | values))


def pictures(seed: int, count: int, height: int, width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        h, w = int(rng.integers(height // 2, height + 1)), int(rng.integers(width // 2, width + 1))
        pixels = np.zeros((h, w, 3), np.uint8)
        for channel in range(3):
            y, x = rng.integers(0, h - 4), rng.integers(0, w - 4)
            pixels[y : y + 3, x : x + 3, channel] = 255
        images.append(pixels)
    return images


def names(found: list[Candidate]) -> list[str]:
    return [each.name for each in found]


def test_its_answers_are_those_of_the_pictures(gpus: Gpus, bundle: Bundle) -> None:
    engine = open_engine(settings_for(bundle), bundle)
    assert isinstance(engine, TensorRTEngine)
    for canvas in CANVASES:
        for count in (1, 3, 4):
            images = pictures(count, count, canvas.height, canvas.width)
            raw, wanted = (run_engine(each, images, canvas) for each in (engine, FakeEngine()))
            np.testing.assert_allclose(raw.boxes, wanted.boxes, atol=1e-6)
            np.testing.assert_array_equal(raw.scores, wanted.scores)
            np.testing.assert_array_equal(raw.labels, wanted.labels)
    engine.close()
    assert gpus.cuda.left() == []


def test_its_name_says_what_runs(gpus: Gpus, bundle: Bundle) -> None:
    engine = open_engine(settings_for(bundle, device="cuda:1"), bundle)
    assert engine.name == "tensorrt 10.14 on cuda:1 (Double 1, sm80), fp16, CUDA graphs"
    engine.close()


def test_every_batch_size_is_a_graph_before_the_first_request(gpus: Gpus, bundle: Bundle) -> None:
    engine = open_engine(settings_for(bundle, max_batch_size=3), bundle)
    assert gpus.cuda.calls.count("capture") == 3 * len(CANVASES)
    captured = len(gpus.cuda.calls)
    run_engine(engine, pictures(1, 3, 64, 96), CANVASES[1])
    assert "capture" not in gpus.cuda.calls[captured:]
    engine.close()


def test_rtx_compiles_its_kernels_once(gpus: Gpus, tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "rtx", "rtx-sm80-fp16.engine")
    settings = settings_for(bundle, engine="tensorrt", engine_cache=tmp_path / "cache")
    open_engine(settings, bundle).close()
    [kept] = (tmp_path / "cache" / "kernels").iterdir()
    assert kept.name == f"{bundle.manifest.engines[0].sha256[:32]}-sm80.bin"
    kept.write_bytes(b"kernels of last time")
    open_engine(settings, bundle).close()
    assert kept.read_bytes() == b"kernels of last time"


def test_no_more_kinds_are_warmed_than_are_kept(gpus: Gpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("runtime.session", "server.tensorrt_engine"):
        monkeypatch.setattr(f"{place}.MOST_PROGRAMS", 3 * len(CANVASES))
    bundle = bundle_with(tmp_path / "large", SM80, most=9)
    engine = open_engine(settings_for(bundle, max_batch_size=9), bundle)
    assert gpus.cuda.calls.count("capture") == 3 * len(CANVASES)
    before = len(gpus.cuda.calls)
    run_engine(engine, pictures(1, 9, 64, 96), CANVASES[1])
    assert "launch" in gpus.cuda.calls[before:], "the largest are ready"
    engine.close()


def test_a_service_on_it(gpus: Gpus, bundle: Bundle) -> None:
    app = create_app(settings_for(bundle))
    with TestClient(app) as client:
        answer = client.post("/detect", content=encode(rectangle(RED)), headers={"Content-Type": "image/png"}).json()
        assert [(each["label"], each["box"]) for each in answer["images"][0]["detections"]] == [("red", list(BOX))]
        parts = [("images", ("a.png", encode(rectangle(color)), "image/png")) for color in (GREEN, RED) * 5]
        images = client.post("/detect", files=parts).json()["images"]
        labels = [[each["label"] for each in image["detections"]] for image in images]
        assert labels == [["green"], ["red"]] * 5
        assert client.get("/model").json()["engine"].startswith("tensorrt 10.14 on cuda:0 (Double 0, sm80), fp16")
    assert gpus.left() == []


def test_model_says_what_was_picked_and_why_no_other(gpus: Gpus, tmp_path: Path) -> None:
    files = ["tensorrt-sm80-fp32.engine", SM80]
    old = Plan(profiles=tuple((canvas.height, canvas.width, 4) for canvas in CANVASES), version="9.3")
    bundle = bundle_with(tmp_path / "old", *files, plan=old)
    with TestClient(create_app(settings_for(bundle))) as client:
        model = client.get("/model").json()
    assert model["engine"].startswith("onnxruntime")
    [verdict] = model["gate"]
    assert [each.split(":")[0] for each in verdict["unavailable"]] == [
        "tensorrt tensorrt-sm80-fp16.engine on cuda",
        "tensorrt tensorrt-sm80-fp32.engine on cuda",
    ]
    assert "cannot be loaded by tensorrt 10.14" in verdict["unavailable"][0]
    bundle = bundle_with(tmp_path / "none")
    with TestClient(create_app(settings_for(bundle))) as client:
        [verdict] = client.get("/model").json()["gate"]
    assert verdict["unavailable"][0] == "tensorrt: the bundle has no engine (ddetr build adds one)"


def test_instances_on_several_gpus_and_one_that_died_comes_back_on_its_own(gpus: Gpus, bundle: Bundle) -> None:
    app = create_app(settings_for(bundle, device="cuda:0,cuda:1", engine_instances=2))
    assert gpus.opened == [(SM80, 0), (SM80, 1), (SM80, 0), (SM80, 1)]
    with TestClient(app) as client:
        gpus.cuda.fail_on(1, "await_event", CudaFailed("cudaEventSynchronize: an illegal memory access"))
        for _ in range(40):
            parts = [("images", ("a.png", encode(rectangle(RED)), "image/png"))] * 16
            client.post("/detect", files=parts)
            if len(gpus.opened) > 4:
                break
        gpus.cuda.fail_on(None, "", None)
        assert {device for _, device in gpus.opened[4:]} == {1}
    assert gpus.left() == []


# --- which one --------------------------------------------------------------------------------------------------------


def test_the_best_comes_first(gpus: Gpus, tmp_path: Path) -> None:
    files = ["rtx-sm80-fp16.engine", "tensorrt-sm80-fp32.engine", "rtx-sm80-fp32.engine", SM80]
    bundle = bundle_with(tmp_path / "all", *files, "tensorrt-sm86-fp16.engine")
    assert names(candidates(settings_for(bundle), bundle)) == [
        "tensorrt tensorrt-sm80-fp16.engine on cuda:0",
        "tensorrt tensorrt-sm80-fp32.engine on cuda:0",
        "tensorrt rtx-sm80-fp16.engine on cuda:0",
        "tensorrt rtx-sm80-fp32.engine on cuda:0",
        "onnxruntime on cpu",
    ]
    assert names(candidates(settings_for(bundle, precision="fp32"), bundle)) == [
        "tensorrt tensorrt-sm80-fp32.engine on cuda:0",
        "tensorrt rtx-sm80-fp32.engine on cuda:0",
        "onnxruntime on cpu",
    ]
    on_sm86 = settings_for(bundle, device="cuda:2", engine="tensorrt")
    assert names(candidates(on_sm86, bundle)) == ["tensorrt tensorrt-sm86-fp16.engine on cuda:2"]
    assert names(candidates(settings_for(bundle, device="cpu"), bundle)) == ["onnxruntime on cpu"]
    assert [each.precision for each in candidates(settings_for(bundle), bundle)[:2]] == ["fp16", "fp32"]


def test_an_engine_built_with_tf32_is_held_to_its_limits(gpus: Gpus, tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "one", "tensorrt-sm80-fp32.engine")
    record = bundle.manifest.engines[0].model_copy(update={"tf32": True})
    manifest = bundle.manifest.model_copy(update={"engines": (record,)})
    bundle = replace(bundle, manifest=manifest)
    first = candidates(settings_for(bundle), bundle)[0]
    assert isinstance(first, Candidate)
    assert first.precision == "tf32"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"device": "cuda:2"}, "tensorrt: .* has no engine for tensorrt-sm86-fp16; it has tensorrt-sm80-fp16.engine"),
        ({"device": "cuda:7"}, "tensorrt: there is no cuda:7: this machine has cuda:0 to cuda:2"),
        ({"precision": "fp32"}, "tensorrt: .* has no engine for tensorrt-sm80-fp32"),
        ({"device": "cpu"}, "tensorrt: it runs on NVIDIA GPUs, and device is 'cpu'"),
        ({"precision": "int8"}, "tensorrt: it has no int8 here"),
        (
            {"max_batch_size": 5},
            "takes at most 4 images of canvas 64x64, and max_batch_size is 5: set that to 4, or build it with "
            "--max-batch-size 5",
        ),
    ],
)
def test_what_does_not_fit_says_why(gpus: Gpus, bundle: Bundle, values: dict[str, object], reason: str) -> None:
    with pytest.raises(StartupError, match=reason):
        candidates(settings_for(bundle, engine="tensorrt", **values), bundle)
    assert gpus.opened == []


def test_one_of_another_version_is_passed_over_unopened(gpus: Gpus, tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "old", SM80, version="10.9.0.34")
    settings = settings_for(bundle)
    assert names(candidates(settings, bundle)) == ["onnxruntime on cpu"]
    assert passed_over(settings, bundle)[0] == (
        "tensorrt tensorrt-sm80-fp16.engine on cuda:0: it was built with tensorrt 10.9.0.34, and 10.14 is installed: "
        "build it again"
    )
    patched = bundle_with(tmp_path / "patched", SM80, version="10.14.1.48")
    assert names(candidates(settings_for(patched), patched))[0] == "tensorrt tensorrt-sm80-fp16.engine on cuda:0"


def test_one_without_a_proof_is_not_served(gpus: Gpus, bundle: Bundle) -> None:
    for engine in ("auto", "tensorrt"):
        got = open_proven(settings_for(bundle, gate=True, engine=engine), bundle, Metrics(), 0.0)
        assert got.engine.name.startswith("onnxruntime")
        assert got.verdict.result == "no proof"
        assert "carries no proof of its answers: export it anew, or set --no-gate" in got.verdict.passed_over[0]
        got.engine.close()
    with pytest.raises(ParityFailed, match="carries no proof .*on_parity_failure=fallback"):
        open_proven(settings_for(bundle, gate=True, on_parity_failure="refuse"), bundle, Metrics(), 0.0)
    assert gpus.opened == []


def test_one_with_a_proof_is_served(gpus: Gpus, tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "one", SM80, proof=proof_bytes(proof_by(FakeEngine())))
    got = open_proven(settings_for(bundle, gate=True), bundle, Metrics(), 0.0)
    assert (got.verdict.result, got.verdict.passed_over) == ("passed", ())
    assert got.engine.name.startswith("tensorrt")
    got.engine.close()


def test_without_a_gpu_the_cpu_serves_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none() -> list[object]:
        raise NoGpu("no NVIDIA GPU can be used: cudaErrorNoDevice")

    monkeypatch.setattr("server.tensorrt_engine.gpus", none)
    bundle = bundle_with(tmp_path / "one", SM80)
    settings = settings_for(bundle)
    assert passed_over(settings, bundle)[0] == "tensorrt: no NVIDIA GPU can be used: cudaErrorNoDevice"
    with caplog.at_level(logging.INFO):
        engine = open_engine(settings, bundle)
    assert engine.name.startswith("onnxruntime")
    assert "passed over tensorrt: no NVIDIA GPU can be used" in caplog.text
    engine.close()


def test_one_that_cannot_be_opened_makes_way(gpus: Gpus, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = Plan(profiles=tuple((canvas.height, canvas.width, 4) for canvas in CANVASES), version="9.3")
    bundle = bundle_with(tmp_path / "old", SM80, plan=plan)
    engine = open_engine(settings_for(bundle), bundle)
    assert engine.name.startswith("onnxruntime")
    assert "cannot be loaded by tensorrt 10.14 on Double 0 (sm80)" in caplog.text
    engine.close()
    with pytest.raises(StartupError, match="built with tensorrt 10.14 for sm80, cannot be loaded by tensorrt 10.14"):
        open_engine(settings_for(bundle, engine="tensorrt"), bundle)
    assert gpus.cuda.left() == []


def test_whatever_its_bindings_raise_another_kind_serves(
    gpus: Gpus, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_one(*_: object, **__: object) -> object:
        raise AttributeError("'ICudaEngine' object has no attribute 'device_memory_size_v2'")

    with monkeypatch.context() as patch:
        patch.setattr("server.tensorrt_engine.open_tensorrt", open_one)
        got = open_proven(settings_for(bundle), bundle, Metrics(), 0.0)
    assert got.engine.name.startswith("onnxruntime")
    assert "has no attribute 'device_memory_size_v2'" in got.verdict.unavailable[0]
    got.engine.close()
    gpus.cuda.fail("on_gpu", TypeError("incompatible function arguments"), 1)
    got = open_proven(settings_for(bundle), bundle, Metrics(), 0.0)
    assert "incompatible function arguments" in got.verdict.unavailable[0]
    got.engine.close()
    assert gpus.cuda.left() == []


def test_one_without_a_canvas_of_the_bundle_is_refused(gpus: Gpus, tmp_path: Path) -> None:
    plan = Plan(profiles=((64, 96, 4), (64, 64, 2), (96, 64, 4)))
    bundle = bundle_with(tmp_path / "short", SM80, plan=plan)
    with pytest.raises(StartupError, match="takes at most 2 images of canvas 64x64, and max_batch_size is 4"):
        open_engine(settings_for(bundle, engine="tensorrt"), bundle)
    bundle = bundle_with(tmp_path / "less", SM80, plan=Plan(profiles=((64, 96, 4), (96, 64, 4))))
    with pytest.raises(StartupError, match="has no profile for canvas 64x64; build it again"):
        open_engine(settings_for(bundle, engine="tensorrt"), bundle)
    assert gpus.cuda.left() == []


def test_too_little_memory_for_the_largest_batch_is_told_at_the_start(gpus: Gpus, bundle: Bundle) -> None:
    gpus.cuda.fail("allocate", OutOfGpuMemory("cudaMalloc of 25 MiB: out of memory; set max_batch_size lower"), 2)
    with pytest.raises(StartupError, match="25 MiB: out of memory; set max_batch_size"):
        open_engine(settings_for(bundle, engine="tensorrt"), bundle)
    assert gpus.cuda.left() == []


@pytest.mark.parametrize(
    ("device", "instances", "expected"),
    [
        ("auto", 2, ["auto", "auto"]),
        ("cpu", 1, ["cpu"]),
        ("cuda", 1, ["cuda"]),
        ("cuda:1", 2, ["cuda:1", "cuda:1"]),
        ("cuda:2,cuda:0", 2, ["cuda:2", "cuda:0", "cuda:2", "cuda:0"]),
        ("cuda:1,cuda:1", 1, ["cuda:1"]),
        ("all", 2, ["cuda:0", "cuda:1", "cuda:2"] * 2),
    ],
)
def test_engines_are_placed(gpus: Gpus, device: str, instances: int, expected: list[str]) -> None:
    assert [each.device for each in placements(Settings(device=device, engine_instances=instances))] == expected


def test_all_gpus_of_a_machine_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> list[object]:
        raise NoGpu("no NVIDIA GPU can be used")

    monkeypatch.setattr("runtime.gpus", none)
    with pytest.raises(StartupError, match="device 'all': no NVIDIA GPU can be used"):
        placements(Settings(device="all"))
