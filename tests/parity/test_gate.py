"""The gate lets right engines through, in both precisions, and stops every one that is wrong in some way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import plugins
from benchmarks.corruptions import CORRUPTIONS, Corruption, rounded_to_half, run
from bundle import Bundle, Canvas, embedded_bundle, read_bundle
from export.calibrate import calibrate
from export.plain import plain_graph
from export.precision import to_half
from export.quantisable import layers_of
from export.quantise import quantise
from export.trace import trace
from models import load_checkpoint
from parity import Expected, GateReport, Infer, Proof, read_proof, run_gate
from parity.gate import batches_of, noise_of
from tests.parity.test_proof import small_proof

BATCH_SIZE = 3
EXPECTED = {
    "one weight's sign flipped": {"median box error"},
    "one weight's exponent bit flipped": {"difference of the sorted scores"},
    "two channels swapped": {"difference of the sorted scores"},
    "red and blue swapped": {"strays", "difference of the sorted scores"},
    "reference points in half precision": {"signature"},
    "sampling locations in half precision": {"signature"},
    "corners aligned in the sampling": {"difference of the sorted scores"},
    "batch size 1 baked in, others raise": {"raised"},
    "batch size 1 baked in, slot 0's answer for all": {"strays"},
    "one slot's answer zero": {"labels"},
    "slots turned by one": {"strays"},
    "the answer of the batch before": {"strays"},
    "height and width of sizes swapped": {"strays"},
    "mask ignored": {"strays"},
    "a neighbour's pixels in the padding": {"strays"},
    "1/32 of a neighbour's pixels": {"difference of the sorted scores"},
    "labels off by one": {"labels"},
    "two labels swapped": {"strays"},
    "scores not sorted": {"scores"},
    "one NaN": {"boxes"},
    "middle and size instead of corners": {"boxes"},
    "half the detections": {"boxes"},
}
"""Corruption to the figures that have to be among those that catch it."""
IN_INTEGERS = {
    "two channels swapped": {"median box error"},
    "red and blue swapped": {"median box error", "strays"},
    "corners aligned in the sampling": {"median box error"},
    "one slot's answer zero": {"labels"},
    "slots turned by one": {"strays"},
    "mask ignored": {"strays"},
    "two labels swapped": {"strays"},
}
"""The same of a graph in 8 bits, whose noise hides single weights, coordinates in half, and a neighbour's 1/32."""
OF_THE_GRAPH = {name for name in list(EXPECTED)[:7] if not name.startswith("red")}


@pytest.fixture(scope="module")
def embedded() -> Bundle:
    return read_bundle(embedded_bundle())


@pytest.fixture(scope="module")
def proof(embedded: Bundle) -> Proof:
    proof = read_proof(embedded)
    assert proof is not None
    return proof


@pytest.fixture(scope="module")
def full(embedded: Bundle) -> onnx.ModelProto:
    return onnx.load(embedded.onnx_path)


@pytest.fixture(scope="module")
def half(full: onnx.ModelProto) -> onnx.ModelProto:
    return rounded_to_half(full)


def gate(infer: Infer, proof: Proof, precision: str, rounds: int | None = 2) -> GateReport:
    """On the first canvas, which has the signatures."""
    return run_gate(infer, proof, precision, (BATCH_SIZE,), [proof.canvases[0].canvas], rounds=rounds)


def test_the_embedded_bundle_passes_whole(embedded: Bundle, proof: Proof) -> None:
    said: list[str] = []
    infer = run(onnx.load(embedded.onnx_path), plugins.onnxruntime_library())
    report = run_gate(infer, proof, "fp32", (1, BATCH_SIZE), progress=said.append)
    assert report.passed, report.failures
    assert len(report.rows) == len(proof.canvases) * (4 + 4 * BATCH_SIZE)
    assert len(said) == len(proof.canvases) * 2
    assert all(line.endswith("passed") for line in said)
    assert max(row.figures.box_max for row in report.rows) < 5e-6
    assert max(row.figures.signature for row in report.rows) < 0.01
    slots = {(row.canvas, row.slot): {r.picture for r in report.rows if r.slot == row.slot} for row in report.rows}
    assert all(len(pictures) > 1 for pictures in slots.values()), "each slot has seen different pictures"


def test_right_graphs_pass_in_their_precision(full: onnx.ModelProto, half: onnx.ModelProto, proof: Proof) -> None:
    library = plugins.onnxruntime_library()
    assert gate(run(full, library), proof, "fp32").passed
    assert gate(run(full, library), proof, "fp16").passed
    report = gate(run(half, library), proof, "fp16")
    assert report.passed, report.failures
    assert max(row.figures.signature for row in report.rows) < 0.1
    assert not gate(run(half, library), proof, "fp32").passed, "half precision is not float32"


def test_the_functions_in_the_file_pass_without_our_library(full: onnx.ModelProto, proof: Proof) -> None:
    report = gate(run(full, None), proof, "fp32", rounds=1)
    assert report.passed, report.failures


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_graph_that_an_engine_of_half_precision_is_built_of_passes(embedded: Bundle, proof: Proof) -> None:
    assert embedded.checkpoint_path is not None
    model = load_checkpoint(embedded.checkpoint_path)
    to_half(model)
    report = gate(run(trace(model), plugins.onnxruntime_library()), proof, "fp16", rounds=None)
    assert report.passed, report.failures
    assert max(row.figures.signature for row in report.rows) < 0.1


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: corruption.name)
def test_a_corrupted_engine_of_half_precision_is_caught(
    half: onnx.ModelProto, proof: Proof, corruption: Corruption
) -> None:
    report = gate(corruption.engine(half, plugins.onnxruntime_library()), proof, "fp16")
    assert not report.passed
    assert set(report.caught_by) >= EXPECTED[corruption.name], report.failures[:5]
    for line in report.failures:
        assert line.startswith(f"canvas {proof.canvases[0].canvas}, batch of {BATCH_SIZE}"), line


@pytest.mark.parametrize("corruption", [c for c in CORRUPTIONS if c.name in OF_THE_GRAPH], ids=lambda c: c.name)
def test_a_corrupted_graph_of_float32_is_caught(full: onnx.ModelProto, proof: Proof, corruption: Corruption) -> None:
    report = gate(corruption.engine(full, plugins.onnxruntime_library()), proof, "fp32")
    assert set(report.caught_by) >= EXPECTED[corruption.name], report.failures[:5]


@pytest.fixture(scope="module")
def integers(full: onnx.ModelProto, proof: Proof) -> tuple[onnx.ModelProto, Proof]:
    """The network in 8 bits, its ranges from the proof's own pictures; and the proof with the noise measured of it."""
    plain = plain_graph(full)
    pictures = proof.canvases[0].pictures()
    feeds = [{"images": pictures.images[[i]], "sizes": pictures.sizes[[i]]} for i in range(len(pictures.sizes))]
    layers = layers_of(plain)
    library = plugins.onnxruntime_library()
    graph = quantise(plain, layers, calibrate(plain, layers, feeds, library, 1))
    report = run_gate(run(graph, library), proof, "int8", (1,), [proof.canvases[0].canvas])
    assert report.passed, report.failures
    return graph, replace(proof, integers=noise_of(report))


def test_a_right_graph_in_integers_passes_with_room(integers: tuple[onnx.ModelProto, Proof]) -> None:
    """By another kernel of the op than its noise was measured with, and in another batch size."""
    graph, proof = integers
    report = gate(run(graph, None), proof, "int8", rounds=None)
    assert report.passed, report.failures
    for name, noise in noise_of(report).items():
        assert noise < 1.2 * proof.integers[name], "where the limit is 1.5"


def test_an_engine_without_an_answer_has_no_noise(proof: Proof) -> None:
    def infer(images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> Sequence[Any]:
        raise RuntimeError("no kernel")

    report = run_gate(infer, proof, "int8", [1])
    assert set(report.caught_by) == {"raised"}
    assert set(noise_of(report).values()) == {0.0}


@pytest.mark.parametrize("corruption", [c for c in CORRUPTIONS if c.name in IN_INTEGERS], ids=lambda c: c.name)
def test_a_corrupted_graph_in_integers_is_caught(
    integers: tuple[onnx.ModelProto, Proof], corruption: Corruption
) -> None:
    graph, proof = integers
    report = gate(corruption.engine(graph, plugins.onnxruntime_library()), proof, "int8", rounds=None)
    assert set(report.caught_by) >= IN_INTEGERS[corruption.name], report.failures[:5]


def test_every_corruption_has_its_expectation() -> None:
    assert {corruption.name for corruption in CORRUPTIONS} == set(EXPECTED)


def test_the_right_slot_is_named(full: onnx.ModelProto, proof: Proof) -> None:
    right = run(full, plugins.onnxruntime_library())

    def infer(images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> Sequence[Any]:
        boxes, scores, labels = (np.array(output) for output in right(images, sizes))
        boxes[1] = np.clip(boxes[1] + 0.02, 0, 1)
        return boxes, scores, labels

    report = gate(infer, proof, "fp32")
    assert {row.slot for row in report.rows if row.failures} == {1}
    assert all(", slot 1, picture " in line for line in report.failures if "all slots" not in line)
    assert all(row.got is not None for row in report.rows if row.failures)
    assert all(row.got is None for row in report.rows if not row.failures)


# --- without a network ---------------------------------------------------------------------------------------------


def answer(proof: Proof, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> list[NDArray[Any]]:
    """What is expected of each picture, found by its size."""
    (part,) = proof.canvases
    known = {tuple(size): want for size, want in zip(part.pictures().sizes.tolist(), part.expected, strict=True)}
    wants = [known[tuple(size)] for size in sizes.tolist()]
    return [np.stack([getattr(want, name) for want in wants]) for name in ("boxes", "scores", "labels")]


def test_an_engine_that_answers_as_expected_passes() -> None:
    proof = small_proof()
    report = run_gate(lambda i, s: answer(proof, i, s), proof, "fp32", (1, 2, 5))
    assert report.passed, report.failures
    assert {(row.batch_size, row.slot) for row in report.rows} == {(b, s) for b in (1, 2, 5) for s in range(b)}


def test_an_engine_that_raises_is_a_failure_of_that_batch() -> None:
    proof = small_proof()

    def infer(images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> Sequence[Any]:
        if len(images) == 2:
            raise RuntimeError("out of\nmemory")
        return answer(proof, images, sizes)

    report = run_gate(infer, proof, "fp32", (1, 2))
    assert report.failures == ("canvas 32x64, batch of 2: raised: RuntimeError: out of memory",) * 2
    assert {row.batch_size for row in report.rows} == {1}


def test_an_answer_for_fewer_pictures_is_a_failure() -> None:
    proof = small_proof()
    report = run_gate(lambda i, s: [part[:1] for part in answer(proof, i, s)], proof, "fp32", (2,))
    assert report.failures[0].endswith("batch: boxes, scores, labels of [1, 1, 1] images, expected 2")


def test_a_canvas_without_a_proof_is_a_failure() -> None:
    proof = small_proof()
    report = run_gate(lambda i, s: answer(proof, i, s), proof, "fp32", (1,), [Canvas(height=64, width=64)])
    assert report.failures == ("canvas 64x64: canvas: the proof has none of this size, only 32x64",)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_proof_with_too_few_candidates_is_a_failure(kept: int) -> None:
    """An engine that returns K detections cannot be held against fewer, nor against none."""
    proof = small_proof()
    (part,) = proof.canvases
    first, *rest = part.expected
    short = Expected(first.boxes[:kept], first.scores[:kept], first.labels[:kept])
    cut = replace(proof, canvases=(replace(part, expected=(short, *rest) if kept else ()),))
    report = run_gate(lambda i, s: answer(proof, i, s), cut, "fp32", (1, 2))
    assert report.failures == (
        f"canvas 32x64: proof: a picture has {kept} expected detections, engines return {proof.detections}: "
        "export the bundle again",
    )


@pytest.mark.parametrize("best", [0.9, 0.2])
def test_in_integers_an_engine_that_finds_nothing_fails_where_little_is_to_be_found(best: float) -> None:
    proof = small_proof()
    (part,) = proof.canvases
    # One strong detection a picture and the rest weak; with 0.2 there is not even that.
    expected = tuple(
        replace(want, scores=np.where(np.arange(len(want.scores)) == 0, best, 0.05).astype(np.float32))
        for want in part.expected
    )
    proof = replace(proof, canvases=(replace(part, expected=expected),))
    assert run_gate(lambda i, s: answer(proof, i, s), proof, "int8", (1, 2)).passed

    def blind(images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> Sequence[Any]:
        boxes, scores, labels = answer(proof, images, sizes)
        return boxes * 0, scores * 0, labels

    report = run_gate(blind, proof, "int8", (1, 2))
    assert any("all slots: found: 0 of" in line for line in report.failures), report.failures


def test_nothing_compared_is_not_passed() -> None:
    assert not run_gate(lambda i, s: [], small_proof(), "fp32", ()).passed


@pytest.mark.parametrize("pictures", [2, 3, 4, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 8])
def test_every_slot_sees_different_pictures_and_every_picture_is_seen(pictures: int, batch_size: int) -> None:
    batches = batches_of(pictures, batch_size)
    assert all(len(batch) == batch_size for batch in batches)
    assert {index for batch in batches for index in batch} == set(range(pictures))
    for slot in range(batch_size):
        assert len({batch[slot] for batch in batches}) > 1
    if batch_size > 1:
        for index in range(pictures):
            assert len({slot for batch in batches for slot, seen in enumerate(batch) if seen == index}) > 1
