"""A built engine is run and held against the proof where a GPU for it is there; on doubles of the runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import export.engine_gate
import plugins
from benchmarks.corruptions import run
from bundle import Bundle, EngineProfile, EngineRecord, embedded_bundle, read_bundle
from export.engine_gate import CannotRun, EngineWrong, gate_engine, gpu_for, parity_records
from export.layers import LayersWrong
from export.verify import ParityError
from parity import Proof, read_proof
from parity.pictures import draw_pictures
from parity.proof import CanvasProof, pictures_hash
from runtime import Answer, EngineRefused, Gpu, NoGpu, OutOfGpuMemory


@pytest.fixture(scope="module")
def embedded() -> Bundle:
    return read_bundle(embedded_bundle())


@pytest.fixture(scope="module")
def proof(embedded: Bundle) -> Proof:
    """Of one canvas and two pictures: enough here."""
    whole = read_proof(embedded)
    assert whole is not None
    first = whole.canvases[0]
    return replace(whole, canvases=(first_two(first),))


def first_two(part: CanvasProof) -> CanvasProof:
    digest = pictures_hash(draw_pictures(part.canvas, part.seeds[:2]))
    return replace(part, seeds=part.seeds[:2], expected=part.expected[:2], sha256=digest)


@pytest.fixture(scope="module")
def record(embedded: Bundle) -> EngineRecord:
    profiles = tuple(
        EngineProfile(canvas=canvas, typical_batch_size=2, max_batch_size=3) for canvas in embedded.manifest.canvases
    )
    return EngineRecord(
        file="rtx-sm89-fp32.engine",
        flavour="rtx",
        arch="sm89",
        precision="fp32",
        sha256="0" * 64,
        built_with={"rtx": "1.7.1"},
        targets=("sm89",),
        profiles=profiles,
    )


@dataclass
class Session:
    """ONNX Runtime in the place of TensorRT's session."""

    answer: Callable[..., Any]
    batches: list[int]
    closed: bool = False
    layers: str = ""

    def infer(self, images: np.ndarray, sizes: np.ndarray) -> Answer:
        self.batches.append(len(images))
        return Answer(*self.answer(images, sizes))

    def layer_information(self) -> str:
        assert self.batches, "shapes are known after a batch"
        return self.layers

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def session(embedded: Bundle, monkeypatch: pytest.MonkeyPatch) -> Session:
    infer = run(onnx.load(embedded.onnx_path), plugins.onnxruntime_library())
    session = Session(infer, [])

    def opened(path: Path, flavour: str, device: int, plugin: Path | None, built_with: str) -> Session:
        assert (flavour, device, built_with) == ("rtx", 1, "1.7.1")
        return session

    monkeypatch.setattr(export.engine_gate, "open_tensorrt", opened)
    return session


def test_a_right_engine_is_measured_in_every_batch_size_of_its_profiles(
    session: Session, record: EngineRecord, proof: Proof
) -> None:
    report = gate_engine(Path("engine"), record, proof, 1)
    assert report.passed
    assert set(session.batches) == {1, 2, 3}
    assert session.closed
    found = parity_records(report, record.file)
    assert [(one.batch_size, one.engine) for one in found] == [(size, record.file) for size in (1, 2, 3)]
    assert all(0 < one.max_box_error < 1e-5 for one in found)
    assert all(one.detections_compared and one.detections_compared > 50 * one.batch_size for one in found)


def test_an_engine_whose_products_round_to_10_bits_is_held_to_the_limits_of_half_precision(
    session: Session, record: EngineRecord, proof: Proof
) -> None:
    report = gate_engine(Path("engine"), record.model_copy(update={"tf32": True}), proof, 1)
    assert report.precision == "tf32"
    assert report.limits.box_median > 10 * gate_engine(Path("engine"), record, proof, 1).limits.box_median


def test_a_wrong_engine_is_refused_naming_figure_and_place(
    session: Session, record: EngineRecord, proof: Proof
) -> None:
    right = session.answer

    def shifted(images: np.ndarray, sizes: np.ndarray) -> Any:
        boxes, scores, labels = right(images, sizes)
        boxes[-1] += 0.01
        return boxes, scores, labels

    session.answer = shifted
    with pytest.raises(EngineWrong, match=r"rtx-sm89-fp32\.engine answers wrong and is not published: canvas 288x288"):
        gate_engine(Path("engine"), record, proof, 1)
    assert session.closed
    assert issubclass(EngineWrong, ParityError), "what the command says in a line"


PLUGIN = {"Name": "a", "LayerType": "PluginV3", "Outputs": [{"Name": "x", "Format/Datatype": "Half"}]}
FLOAT = {"Name": "b", "LayerType": "gemm", "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP32"}]}
PLAIN = {"Name": "c", "LayerType": "kgen", "Outputs": [{"Name": "z", "Format/Datatype": "Float"}]}


def told(*layers: object) -> str:
    return json.dumps({"Layers": layers, "Bindings": []})


def test_the_engines_own_report_of_its_layers_is_held_against_its_precision(
    session: Session, record: EngineRecord, proof: Proof
) -> None:
    said: list[str] = []
    session.layers = told({**FLOAT, "LayerType": "PluginV3"}, FLOAT, PLAIN)
    gate_engine(Path("engine"), record, proof, 1, said.append)
    assert said[-1] == "the engine's own report: 3 layers, 1 plugin, 0 half, 3 float"
    for layers, complaint in (
        (told(PLUGIN, FLOAT), r"2 layers, 1 plugin, 1 half, 1 float; it was to be fp32"),
        (told(FLOAT, PLAIN), "2 layers, 0 plugin, 0 half, 2 float; the op should be a plugin"),
    ):
        session.layers = layers
        with pytest.raises(LayersWrong, match=complaint):
            gate_engine(Path("engine"), record, proof, 1, said.append)
    half = record.model_copy(update={"precision": "fp16"})
    session.layers = told({**FLOAT, "LayerType": "PluginV3"}, FLOAT)
    with pytest.raises(LayersWrong, match="0 half, 2 float; it was to be fp16"):
        gate_engine(Path("engine"), half, proof, 1, said.append)
    session.layers = told(PLUGIN, FLOAT)
    gate_engine(Path("engine"), half, proof, 1, said.append)
    assert said[-1] == "the engine's own report: 2 layers, 1 plugin, 1 half, 1 float"


@pytest.mark.parametrize("layers", ["", "[]", '{"Layers": ["a", "b"], "Bindings": []}', '{"Layers": 3}'])
def test_an_engine_that_does_not_tell_its_layers_passes_by_its_answers(
    session: Session, record: EngineRecord, proof: Proof, layers: str
) -> None:
    said: list[str] = []
    session.layers = layers
    assert gate_engine(Path("engine"), record, proof, 1, said.append).passed
    assert "cannot be read" in said[-1] or "2 layers, 0 plugin, 0 half, 0 float" in said[-1]


def test_lack_of_memory_says_nothing_about_an_engine_and_a_refusal_does(
    record: EngineRecord, proof: Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    for raised, expected in ((OutOfGpuMemory("3 GiB"), CannotRun), (EngineRefused("not of this GPU"), EngineRefused)):

        def fails(*_: Any, raised: Exception = raised) -> Any:
            raise raised

        monkeypatch.setattr(export.engine_gate, "open_tensorrt", fails)
        with pytest.raises(expected, match=str(raised)):
            gate_engine(Path("engine"), record, proof, 1)


def test_the_gpu_is_one_that_the_engine_was_built_for(record: EngineRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    there = [Gpu(0, "L40", "sm90"), Gpu(1, "4090", "sm89")]
    monkeypatch.setattr(export.engine_gate, "gpus", lambda: there)
    assert gpu_for(record) == there[1]
    with pytest.raises(CannotRun, match=r"it is for sm120, this machine's GPUs are L40 \(sm90\), 4090 \(sm89\)"):
        gpu_for(record.model_copy(update={"targets": ("sm120",)}))


def test_without_a_gpu_it_cannot_run(record: EngineRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> list[Gpu]:
        raise NoGpu("no NVIDIA GPU can be used: no driver")

    monkeypatch.setattr(export.engine_gate, "gpus", none)
    with pytest.raises(CannotRun, match="no NVIDIA GPU"):
        gpu_for(record)
