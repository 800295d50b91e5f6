"""The proof that is made of a network: one right answer a picture, and what rounding and known faults do to it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

import export.proof
import models.attention
from bundle import embedded_bundle, read_bundle
from export.proof import HOPELESS_AFTER, MARGIN, PICTURES, TRIES, check_proof, make_proof, rounded_to_half
from export.signatures import SIGNATURES, with_fault
from export.verify import ParityError, Pictures, pytorch_answers
from models import DeformableDetr
from parity import Proof, read_proof
from parity.limits import MEASURED
from parity.proof import proof_bytes
from tests.export.small import CANVASES, CATEGORY_IDS, build, small


@pytest.fixture(scope="module")
def model() -> DeformableDetr:
    return build(small("r50-two-stage"))


@pytest.fixture(scope="module")
def proof(model: DeformableDetr) -> Proof:
    return make_proof(model, CANVASES, 100)


def test_every_canvas_has_its_pictures_and_their_candidates(proof: Proof) -> None:
    assert tuple(part.canvas for part in proof.canvases) == CANVASES
    assert proof.detections == 48, "12 queries of 4 classes are all there are"
    assert proof.categories == CATEGORY_IDS
    for part in proof.canvases:
        assert len(part.expected) == len(set(part.seeds)) == PICTURES
        for expected in part.expected:
            assert (np.diff(expected.scores) <= 0).all()
            assert set(expected.labels.tolist()) == set(CATEGORY_IDS)


def test_half_precision_and_the_faults_are_measured(proof: Proof) -> None:
    assert set(proof.half) == set(MEASURED)
    assert all(0 < value < 1e-2 for value in proof.half.values())
    first, *others = proof.canvases
    for expected in first.expected:
        assert set(expected.signatures) == set(SIGNATURES)
        assert any(np.abs(moved).max() > 1e-6 for moved in expected.signatures.values())
    assert not any(expected.signatures for part in others for expected in part.expected)


def forwards_of(model: DeformableDetr, margin: float, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the backbone computes for a proof of one canvas whose proposals all have this margin."""
    computed: list[None] = []
    hook = model.backbone.conv1.register_forward_hook(lambda *_: computed.append(None))
    answer = export.proof.pytorch_answers
    monkeypatch.setattr(
        export.proof, "pytorch_answers", lambda *asked: (answer(*asked)[0], [margin] * len(asked[1].sizes))
    )
    make_proof(model, CANVASES[:1], 100)
    hook.remove()
    return len(computed)


@pytest.mark.parametrize(("margin", "tries"), [(MARGIN, 1), (MARGIN / 2, TRIES), (MARGIN / 5, HOPELESS_AFTER)])
def test_seeds_are_tried_while_there_is_hope(
    model: DeformableDetr, margin: float, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a picture: each try, once for all faults, and once rounded; a full-size forward takes seconds.
    assert forwards_of(model, margin, monkeypatch) == PICTURES * (tries + 1) + PICTURES


def test_a_signature_is_what_the_fault_does(model: DeformableDetr, proof: Proof) -> None:
    part, fault = proof.canvases[0], "reference points in half precision"
    pictures = part.pictures()
    answers = []
    for context in (nullcontext(), with_fault(fault)):
        with context:
            answers.append(pytorch_answers(model, Pictures(pictures.images[[1]], pictures.sizes[[1]]))[0].boxes[0])
    moved = part.expected[1].signatures[fault]
    there = np.abs(moved).max(-1) > 0
    assert there.any()
    for shift, box in zip(moved[there], part.expected[1].boxes[there], strict=True):
        query = np.abs(answers[0] - box).max(-1).argmin()
        np.testing.assert_allclose(shift, (answers[1] - answers[0])[query], atol=1e-6)


def test_the_same_network_has_the_same_proof(model: DeformableDetr, proof: Proof) -> None:
    again = make_proof(model, CANVASES, 100)
    assert [part.seeds for part in again.canvases] == [part.seeds for part in proof.canvases]
    np.testing.assert_allclose(again.canvases[0].expected[0].boxes, proof.canvases[0].expected[0].boxes, atol=1e-6)


def test_the_network_is_left_as_it_was(model: DeformableDetr) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounded = rounded_to_half(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    weight = rounded.backbone.conv1.weight
    assert torch.equal(weight, weight.half().float())
    assert not torch.equal(weight, before["backbone.conv1.weight"])


@pytest.mark.parametrize("fault", SIGNATURES)
def test_a_fault_moves_samples_by_little_and_ends(fault: str) -> None:
    op = models.attention.__dict__["ms_deform_attn"]
    torch.manual_seed(0)
    shapes = torch.tensor([[36, 48], [18, 24]])
    value = torch.randn(1, 36 * 48 + 18 * 24, 2, 4)
    offsets, logits = torch.randn(1, 5, 2, 2, 4, 2), torch.randn(1, 5, 2, 8)
    for numbers in (2, 4):
        reference = torch.rand(1, 5, 2, numbers) * 0.5 + 0.2
        right = op(value, shapes, reference, offsets, logits)
        with with_fault(fault):
            faulty = models.attention.__dict__["ms_deform_attn"](value, shapes, reference, offsets, logits)
        moved = (faulty - right).abs().max()
        assert 1e-5 < moved < 0.2, "some hundredths of a pixel"
    assert models.attention.__dict__["ms_deform_attn"] is op


def test_a_graph_that_fails_its_own_proof_is_not_published() -> None:
    bundle = read_bundle(embedded_bundle())
    proof = read_proof(bundle)
    assert proof is not None
    graph = onnx.load(bundle.onnx_path)
    first = proof.canvases[0]
    check_proof(replace(proof, canvases=(first,)), graph)
    moved = tuple(replace(expected, boxes=expected.boxes + 0.01) for expected in first.expected)
    with pytest.raises(ParityError, match="the graph does not pass the proof made for it: canvas 288x288"):
        check_proof(replace(proof, canvases=(replace(first, expected=moved),)), graph)


def test_a_proof_of_a_hundred_detections_is_small(proof: Proof) -> None:
    assert len(proof_bytes(proof)) < 60_000
