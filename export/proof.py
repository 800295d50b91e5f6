"""A bundle's proof: pictures on which the network has one right answer, and what float32 PyTorch says to them."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from bundle import Canvas
from export.precision import halved_layers
from export.verify import CUT_MARGIN, Answers, pytorch_answers
from export.verify import Pictures as Batch
from models import DeformableDetr
from parity import Expected, Pictures, Proof, limits_for, proof_pictures
from parity.compare import Answer, compare
from parity.limits import MEASURED
from parity.proof import CanvasProof, pictures_hash

PICTURES = 4  # a canvas
SEEDS = 8
"""Tried in turn for pictures none of whose proposals are tied at the cut; the best of them where all are."""
SPARE = 200
"""Candidates beyond the K best that are kept: an engine in half precision may return some of them."""


def make_proof(
    model: DeformableDetr, canvases: Sequence[Canvas], detections: int, progress: Callable[[str], None] = lambda _: None
) -> Proof:
    """The proof of a float32 network for these canvases, half precision's own errors measured on the first of them.

    detections: K of the served graph.
    """
    ids = model.config.category_ids or tuple(range(model.config.num_classes))
    detections = min(detections, model.config.num_queries * model.config.num_classes)
    parts = []
    for canvas in canvases:
        seed, answers, margin = _seeded(model, canvas)
        pictures = proof_pictures(canvas, seed, PICTURES)
        expected = tuple(_expected(answers, index, detections + SPARE, ids) for index in range(PICTURES))
        parts.append(CanvasProof(canvas, seed, pictures_hash(pictures), expected))
        progress(f"proof on {canvas}: {PICTURES} pictures of seed {seed}, proposals {margin:.1e} from a tie")
    half = _half_errors(model, parts[0], detections, ids)
    said = ", ".join(f"{name.replace('_', ' ')} error {value:.1e}" for name, value in half.items())
    progress(f"half precision moves this network by: {said}")
    return Proof(tuple(parts), detections, tuple(ids), half)


def _seeded(model: DeformableDetr, canvas: Canvas) -> tuple[int, Answers, float]:
    """A seed, PyTorch's answers to its pictures, and how far (in logits) the nearest proposals are from a tie."""
    best: tuple[int, Answers, float] | None = None
    for seed in range(1, SEEDS + 1):
        answers, margins = _answers(model, proof_pictures(canvas, seed, PICTURES))
        if best is None or min(margins) > best[2]:
            best = seed, answers, min(margins)
        if best[2] >= 2 * CUT_MARGIN:
            break
    assert best is not None
    return best


def _answers(model: DeformableDetr, pictures: Pictures) -> tuple[Answers, list[float]]:
    """One picture at a time, as a batch of large ones takes gigabytes; and each one's margin."""
    said = [
        pytorch_answers(model, Batch(pictures.images[[index]], pictures.sizes[[index]]))
        for index in range(len(pictures.sizes))
    ]
    scores, boxes = (np.concatenate([getattr(part, name) for part, _ in said]) for name in ("scores", "boxes"))
    return Answers(scores=scores, boxes=boxes), [margin for _, margins in said for margin in margins]


def _expected(answers: Answers, index: int, most: int, ids: Sequence[int]) -> Expected:
    """The best `most` candidates of a picture, over queries x classes."""
    scores = answers.scores[index]  # [Q, classes]
    order = np.argsort(-scores.ravel(), kind="stable")[:most]
    query, label = np.divmod(order, scores.shape[1])
    return Expected(answers.boxes[index][query], scores.ravel()[order], np.asarray(ids, np.int64)[label])


def _half_errors(model: DeformableDetr, part: CanvasProof, detections: int, ids: Sequence[int]) -> dict[str, float]:
    """The measured figures' worst values over the pictures of one canvas, the network rounded to half precision."""
    answers, _ = _answers(rounded_to_half(model), part.pictures())
    limits = limits_for("fp16")
    found = []
    for index, want in enumerate(part.expected):
        got = _expected(answers, index, detections, ids)
        found.append(compare(Answer(got.boxes, got.scores, got.labels), want, limits, detections, ids))
    return {name: max(float(getattr(figures, name)) for figures in found) for name in MEASURED}


def rounded_to_half(model: DeformableDetr) -> DeformableDetr:
    """A copy that computes in float32 and rounds where `export.precision.to_half` does: as exact, and not as slow."""
    model = copy.deepcopy(model)
    for layer in halved_layers(model):
        for parameter in layer.parameters(recurse=False):
            parameter.data = _rounded(parameter.data)
        layer.register_forward_pre_hook(lambda _layer, inputs: tuple(_rounded(value) for value in inputs))
        layer.register_forward_hook(lambda _layer, _inputs, output: _rounded(output))
    return model


def _rounded(value: Tensor) -> Tensor:
    return value.half().to(value.dtype) if value.is_floating_point() else value
