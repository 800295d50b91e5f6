"""Engines whose answers are wrong are not served."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from bundle import Bundle, Manifest
from parity.proof import Proof, proof_bytes
from runtime import OutOfGpuMemory
from server.app import create_app
from server.engine import Candidate, RawDetections
from server.errors import ParityFailed, StartupError
from server.gate import GivenUp, open_proven, prove
from server.metrics import Metrics
from server.onnxruntime_engine import OnnxRuntimeEngine
from server.served import open_bundle
from server.settings import Settings
from tests.server.fake_engine import MANIFEST, FakeEngine, Inputs
from tests.server.gpus import bundle_with, installed
from tests.server.pictures import RED, encode, rectangle
from tests.server.proofs import proof_by
from tests.server.test_run import ROOT, SERVE
from tests.server.tiny_bundle import write_tiny_bundle

ALL_S = 60.0
CANVASES = len(MANIFEST.canvases)


class WrongEngine(FakeEngine):
    """Is wrong in the way that is asked for."""

    def __init__(self, wrong: str, manifest: Manifest = MANIFEST) -> None:
        super().__init__(manifest)
        self.wrong = wrong
        self.name = f"fake, {wrong}"

    def prepare(self, images: Any, canvas: Any) -> Inputs:
        inputs = super().prepare(images, canvas)
        if self.wrong == "sizes swapped":
            inputs.sizes = inputs.sizes[:, ::-1]
        return inputs

    def finish(self, outputs: RawDetections) -> RawDetections:
        if self.wrong == "last slot zero" and len(outputs.boxes) > 1:
            outputs.boxes[-1] = 0
        if self.wrong == "batch of one":
            return RawDetections(outputs.boxes[:1], outputs.scores[:1], outputs.labels[:1])
        if self.wrong == "labels swapped":
            outputs.labels[:] = outputs.labels[:, ::-1]
        if self.wrong == "boxes moved":
            outputs.boxes[:] += 1e-4
        if self.wrong == "not a number":
            outputs.scores[:] = np.nan
        if self.wrong == "raises":
            raise RuntimeError("no such kernel")
        return outputs


@pytest.fixture(scope="module")
def proof() -> Proof:
    return proof_by(FakeEngine())


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with a proof."""
    folder = tmp_path_factory.mktemp("proven") / "tiny"
    engine = OnnxRuntimeEngine(write_tiny_bundle(folder), Settings(bundle=folder, device="cpu"))
    content = proof_bytes(proof_by(engine))
    engine.close()
    return write_tiny_bundle(folder, proof=content)


class Kinds:
    """Stands in for the engines of this machine: fakes, the best first. "opens not" cannot be opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kinds = ["right"]
        self.asked: list[tuple[str, str]] = []  # engine and device of the settings
        self.opened: list[FakeEngine] = []
        monkeypatch.setattr("server.gate.candidates", self._candidates)
        monkeypatch.setattr("server.gate.passed_over", lambda settings, bundle: ())

    def _candidates(self, settings: Settings, bundle: Bundle) -> list[Candidate]:
        self.asked.append((settings.engine, settings.device))

        def open_one(kind: str) -> FakeEngine:
            if kind == "opens not":
                raise StartupError("no device")
            engine = FakeEngine(bundle.manifest) if kind == "right" else WrongEngine(kind, bundle.manifest)
            self.opened.append(engine)
            return engine

        return [Candidate(kind, "fp32", lambda kind=kind: open_one(kind)) for kind in self.kinds]  # type: ignore[misc]


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Kinds:
    return Kinds(monkeypatch)


@pytest.fixture
def bundle(tmp_path: Path, proof: Proof) -> Bundle:
    """A bundle whose proof the fake engine passes."""
    return write_tiny_bundle(tmp_path / "bundle", proof=proof_bytes(proof))


def failures(metrics: Metrics, kind: str) -> bool:
    return f'ddetr_parity_failures_total{{engine="{kind}"}} 1.0'.encode() in metrics.exposition()


def test_a_comparison_that_nobody_waits_for_ends_early_and_lets_the_engine_go(kinds: Kinds, bundle: Bundle) -> None:
    settings = Settings(bundle=bundle.path, max_batch_size=4)
    with pytest.raises(GivenUp):
        open_proven(settings, bundle, Metrics(), ALL_S, given_up=lambda: bool(kinds.opened and kinds.opened[0].batches))
    (engine,) = kinds.opened
    assert len(engine.batches) == 1
    assert engine.closed
    kinds.kinds = ["opens not", "right"]
    with pytest.raises(GivenUp):
        open_proven(settings, bundle, Metrics(), ALL_S, given_up=lambda: True)
    assert len(kinds.opened) == 1


def test_a_right_engine_passes_on_every_canvas_batch_size_and_slot(proof: Proof) -> None:
    engine = FakeEngine()
    verdict = prove(engine, proof, "fp32", max_batch_size=4, seconds=ALL_S)
    assert verdict.result == "passed"
    assert verdict.left_out == ()
    assert verdict.compared == CANVASES * (1 + 4 + 2)
    assert set(engine.batches) == {(size, canvas) for size in (1, 2, 4) for canvas in MANIFEST.canvases}
    assert verdict.worst["box_median"] == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        "labels swapped",
        "sizes swapped",
        "last slot zero",
        "batch of one",
        "boxes moved",
        "not a number",
        "raises",
    ],
)
def test_a_wrong_engine_is_caught_and_the_place_is_named(proof: Proof, wrong: str) -> None:
    with pytest.raises(ParityFailed, match=r"canvas \d+x\d+, batch of \d"):
        prove(WrongEngine(wrong), proof, "fp32", max_batch_size=4, seconds=ALL_S)


def test_without_time_one_picture_a_canvas_is_compared_and_the_rest_is_named(proof: Proof) -> None:
    engine = FakeEngine()
    verdict = prove(engine, proof, "fp32", max_batch_size=3, seconds=0.0)
    assert engine.batches == [(1, canvas) for canvas in MANIFEST.canvases]
    assert len(verdict.left_out) == 2 * CANVASES
    assert f"canvas {MANIFEST.canvases[0]} in batches of 3" in verdict.left_out
    with pytest.raises(ParityFailed):
        prove(WrongEngine("labels swapped"), proof, "fp32", max_batch_size=3, seconds=0.0)


def test_a_canvas_that_the_proof_lacks_is_a_failure(proof: Proof) -> None:
    less = Proof(proof.canvases[1:], proof.detections, ())
    with pytest.raises(ParityFailed, match="the proof has none of this size"):
        prove(FakeEngine(), less, "fp32", max_batch_size=1, seconds=ALL_S)


def test_the_next_engine_stands_in_for_one_that_is_wrong(bundle: Bundle, kinds: Kinds) -> None:
    kinds.kinds = ["boxes moved", "opens not", "right"]
    metrics = Metrics()
    proven = open_proven(Settings(bundle=bundle.path), bundle, metrics, ALL_S)
    assert proven.engine.name == "fake"
    assert proven.verdict.result == "passed"
    assert "fake, boxes moved: canvas" in proven.verdict.passed_over[0]
    assert [engine.closed for engine in kinds.opened] == [True, False]
    assert failures(metrics, "boxes moved")


def test_refuse_means_no_other_engine(bundle: Bundle, kinds: Kinds) -> None:
    kinds.kinds = ["boxes moved", "right"]
    with pytest.raises(ParityFailed, match=r"fake, boxes moved: canvas .*on_parity_failure=fallback"):
        open_proven(Settings(bundle=bundle.path, on_parity_failure="refuse"), bundle, Metrics(), ALL_S)
    assert [engine.closed for engine in kinds.opened] == [True]


def test_if_all_are_wrong_nothing_is_served(bundle: Bundle, kinds: Kinds) -> None:
    kinds.kinds = ["boxes moved", "opens not", "raises"]
    with pytest.raises(ParityFailed, match=r"no engine answers right: .*boxes moved.*RuntimeError.*no device"):
        open_proven(Settings(bundle=bundle.path), bundle, Metrics(), ALL_S)
    assert all(engine.closed for engine in kinds.opened)


def test_an_engine_that_was_asked_for_by_name_and_is_wrong_falls_back_to_onnx_runtime(
    bundle: Bundle, kinds: Kinds
) -> None:
    kinds.kinds = ["boxes moved"]
    with pytest.raises(ParityFailed):
        open_proven(Settings(bundle=bundle.path, engine="tensorrt", device="cuda:1"), bundle, Metrics(), ALL_S)
    assert kinds.asked == [("tensorrt", "cuda:1"), ("onnxruntime", "cuda:1"), ("onnxruntime", "cpu")]


def test_an_engine_that_was_asked_for_by_name_and_does_not_open_falls_back_to_nothing(
    bundle: Bundle, kinds: Kinds
) -> None:
    kinds.kinds = ["opens not"]
    with pytest.raises(StartupError, match="^no device$"):
        open_proven(Settings(bundle=bundle.path, engine="tensorrt"), bundle, Metrics(), ALL_S)
    assert kinds.asked == [("tensorrt", "auto")]


def test_the_float_graph_stands_in_whatever_precision_was_asked_for_and_is_wrong(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only(settings: Settings, bundle: Bundle) -> list[Candidate]:
        if settings.precision == "fp16" and settings.engine == "onnxruntime":
            raise StartupError("the bundle has no graph of precision fp16 for it")
        precision = "fp32" if settings.precision == "auto" else settings.precision
        engine = FakeEngine() if precision == "fp32" else WrongEngine("raises")
        return [Candidate("onnxruntime on cpu", precision, lambda: engine)]

    monkeypatch.setattr("server.gate.candidates", only)
    monkeypatch.setattr("server.gate.passed_over", lambda settings, bundle: ())
    for precision in ("int8", "fp16"):
        got = open_proven(Settings(bundle=bundle.path, precision=precision), bundle, Metrics(), ALL_S)
        assert (got.verdict.result, got.verdict.precision) == ("passed", "fp32")
        assert got.verdict.passed_over


def test_one_that_lacks_memory_is_not_wrong_but_cannot_be_used(
    bundle: Bundle, kinds: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(engine: WrongEngine, outputs: RawDetections) -> RawDetections:
        raise OutOfGpuMemory("cudaMalloc of 25 MiB: out of memory")

    monkeypatch.setattr(WrongEngine, "finish", finish)
    kinds.kinds = ["lacks memory", "right"]
    metrics = Metrics()
    settings = Settings(bundle=bundle.path, on_parity_failure="refuse")
    verdict = open_proven(settings, bundle, metrics, ALL_S).verdict
    assert verdict.passed_over == ()
    assert "lacks memory could not be compared: cudaMalloc of 25 MiB: out of memory" in verdict.unavailable[0]
    assert [engine.closed for engine in kinds.opened] == [True, False]
    assert not failures(metrics, "lacks memory")


def test_a_bundle_without_a_proof_is_served_with_a_warning(
    tiny_bundle: Bundle, kinds: Kinds, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ddetr.gate"):
        proven = open_proven(Settings(bundle=tiny_bundle.path), tiny_bundle, Metrics(), ALL_S)
    assert proven.verdict.result == "no proof"
    assert "carries no proof" in caplog.text


def test_the_gate_can_be_left_open(bundle: Bundle, kinds: Kinds) -> None:
    kinds.kinds = ["boxes moved"]
    assert open_proven(Settings(bundle=bundle.path, gate=False), bundle, Metrics(), ALL_S).verdict.result == "off"


def test_a_spoilt_proof_is_refused(tmp_path: Path, kinds: Kinds) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", proof=b"not a proof")
    with pytest.raises(ParityFailed, match="the proof cannot be used"):
        open_proven(Settings(bundle=bundle.path), bundle, Metrics(), ALL_S)
    assert kinds.opened == []


def test_a_real_engine_passes(proven: Bundle) -> None:
    got = open_proven(Settings(bundle=proven.path, device="cpu"), proven, Metrics(), ALL_S)
    assert got.verdict.result == "passed"
    assert got.verdict.left_out == ()
    got.engine.close()


@pytest.fixture
def fallen_back(bundle: Bundle, kinds: Kinds) -> Iterator[TestClient]:
    kinds.kinds = ["boxes moved", "right"]
    with TestClient(create_app(Settings(bundle=bundle.path, stall_timeout_ms=60_000))) as client:
        yield client


def test_readiness_model_and_metrics_tell_of_a_fallback(fallen_back: TestClient) -> None:
    ready = fallen_back.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "ok")
    assert "fake stands in for fake, boxes moved: canvas" in ready.json()["degraded"]
    (gate,) = fallen_back.get("/model").json()["gate"]
    assert (gate["engine"], gate["result"]) == ("fake", "passed")
    assert "boxes moved" in gate["passed_over"][0]
    lines = fallen_back.get("/metrics").text.splitlines()
    for line in (
        'ddetr_parity_failures_total{engine="boxes moved"} 1.0',
        "ddetr_parity_passed 1.0",
        "ddetr_parity_fallback 1.0",
        'ddetr_engine_info{engine="fake",gate="passed",precision="fp32"} 1.0',
    ):
        assert line in lines


def test_the_start_is_refused_with_the_reason(bundle: Bundle, kinds: Kinds) -> None:
    kinds.kinds = ["labels swapped"]
    with pytest.raises(StartupError, match="labels swapped: canvas"):
        create_app(Settings(bundle=bundle.path, on_parity_failure="refuse"))


def test_each_instance_is_compared_the_first_most(bundle: Bundle, kinds: Kinds) -> None:
    create_app(Settings(bundle=bundle.path, engine_instances=2, max_batch_size=2, gate_seconds=ALL_S))
    first, second = kinds.opened
    assert {size for size, _ in first.batches} == {1, 2}
    assert second.batches == [(1, canvas) for canvas in MANIFEST.canvases]


def test_the_first_of_each_file_is_compared_most(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, FakeEngine]] = []

    def one(settings: Settings, bundle: Bundle) -> list[Candidate]:
        def open_one() -> FakeEngine:
            opened.append((settings.device, FakeEngine(bundle.manifest)))
            return opened[-1][1]

        file = "b.engine" if settings.device == "cuda:2" else "a.engine"
        return [Candidate(f"{file} on {settings.device}", "fp32", open_one, source=file)]

    monkeypatch.setattr("server.gate.candidates", one)
    monkeypatch.setattr("server.gate.passed_over", lambda settings, bundle: ())
    devices = "cuda:0,cuda:1,cuda:2"
    create_app(Settings(bundle=bundle.path, device=devices, engine_instances=2, max_batch_size=2, gate_seconds=ALL_S))
    assert [(device, max(size for size, _ in engine.batches)) for device, engine in opened] == [
        ("cuda:0", 2),
        ("cuda:1", 1),
        ("cuda:2", 2),
        ("cuda:0", 1),
        ("cuda:1", 1),
        ("cuda:2", 1),
    ]


def test_each_kind_of_gpu_is_compared_in_full(tmp_path: Path, proof: Proof, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_with(tmp_path / "one", "tensorrt-sm80-fp16.engine", proof=proof_bytes(proof))
    with installed(monkeypatch, "sm80", "sm80", "sm80") as gpus:
        gpus.gpus[1] = replace(gpus.gpus[1], name=gpus.gpus[0].name)
        settings = Settings(bundle=bundle.path, device="all", gate_seconds=ALL_S, engine_instances=2)
        opened = open_bundle(settings, bundle.path, Metrics(), ALL_S)
        whole, short = CANVASES * (1 + 4 + 2), CANVASES
        assert [verdict.compared for verdict in opened.verdicts] == [whole, short, whole, short, short, short]
        again = opened.reopen[2]()
        assert opened.verdicts[2].compared == short, "its kind was compared"
        again.close()
        opened.close()


def test_another_kind_in_a_lost_engines_place_is_compared_as_at_a_start(
    tmp_path: Path, proof: Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("tensorrt-sm80-fp16.engine", "tensorrt-sm80-fp32.engine")
    bundle = bundle_with(tmp_path / "two", *files, proof=proof_bytes(proof))
    with installed(monkeypatch, "sm80") as gpus:
        opened = open_bundle(Settings(bundle=bundle.path, gate_seconds=ALL_S), bundle.path, Metrics(), 0.0)
        gpus.cuda.fail("allocate", OutOfGpuMemory("cudaMalloc of 25 MiB: out of memory"), 1)
        again = opened.reopen[0]()
        assert (opened.verdicts[0].precision, opened.verdicts[0].compared) == ("fp32", CANVASES * (1 + 4 + 2))
        again.close()
        opened.close()


def test_an_engine_that_comes_back_wrong_is_not_served(bundle: Bundle, kinds: Kinds) -> None:
    app = create_app(Settings(bundle=bundle.path, stall_timeout_ms=60_000, on_parity_failure="refuse"))
    with TestClient(app) as client:
        kinds.kinds = ["boxes moved"]
        kinds.opened[0].trouble = "raise"
        picture = encode(rectangle(RED))
        answer = client.post("/detect", content=picture, headers={"Content-Type": "image/png"})
        assert answer.json()["error"]["code"] == "engine_failed"
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert "the last try failed: ParityFailed: fake, boxes moved: canvas" in ready.json()["status"]
        assert all(engine.closed for engine in kinds.opened[1:])


def test_serve_ends_with_1_and_one_line_that_says_what_is_wrong(bundle: Bundle) -> None:
    """The real engine's answers are not those of the fake, which the proof is by."""
    done = subprocess.run(
        [sys.executable, "-c", SERVE],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "DDETR_BUNDLE": str(bundle.path), "DDETR_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "cannot start: no engine answers right: onnxruntime" in last
    assert "canvas" in last
