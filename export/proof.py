"""A bundle's proof: pictures on which the network has one right answer, and what float32 PyTorch says to them."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import onnx
from torch import Tensor

import plugins
from bundle import Canvas
from export.precision import halved_layers
from export.signatures import SIGNATURES, with_fault
from export.trace import OUTPUTS
from export.verify import Answers, ParityError, probing_session, pytorch_answers
from export.verify import Pictures as Batch
from models import DeformableDetr
from parity import Expected, Pictures, Proof, limits_for, run_gate
from parity.compare import Answer, compare, match
from parity.gate import FIGURE_NAMES
from parity.limits import MEASURED
from parity.pictures import draw_pictures
from parity.proof import CanvasProof, pictures_hash

PICTURES = 4  # a canvas
TRIES = 4
"""Seeds tried for a picture whose proposals are not near a tie; the best of them is taken where all are."""
HOPELESS_AFTER = 2
"""Tries, of which none came within a quarter of the margin: proposals lie so dense that more tries would not either."""
MARGIN = 5e-3
"""Logits between the last accepted proposal and the first rejected one: about what half precision moves them by."""
SPARE = 200
"""Candidates beyond the K best that are kept: an engine in half precision may return some of them."""


def make_proof(
    model: DeformableDetr, canvases: Sequence[Canvas], detections: int, progress: Callable[[str], None] = lambda _: None
) -> Proof:
    """The proof of a float32 network for these canvases; half precision's own errors, measured on the first and last.

    detections: K of the served graph.
    """
    ids = model.config.category_ids or tuple(range(model.config.num_classes))
    detections = min(detections, model.config.num_queries * model.config.num_classes)
    parts = []
    for number, canvas in enumerate(canvases):
        found = [_untied(model, canvas, index, 1000 * number + 100 * index) for index in range(PICTURES)]
        seeds = tuple(seed for seed, _, _ in found)
        pictures = draw_pictures(canvas, seeds)
        expected = tuple(_expected(answers, detections + SPARE, ids) for _, answers, _ in found)
        if number == 0:  # one canvas is enough: coordinates are not a canvas's own
            expected = tuple(_signed(model, pictures, index, want, ids) for index, want in enumerate(expected))
        parts.append(CanvasProof(canvas, seeds, pictures_hash(pictures), expected))
        margin = min(margin for _, _, margin in found)
        progress(
            f"proof on {canvas}: {PICTURES} pictures"
            + ("" if margin == float("inf") else f", proposals {margin:.1e} from a tie")
        )
    measured = [_half_errors(model, part, detections, ids) for part in dict.fromkeys((parts[0], parts[-1]))]
    half = {name: max(figures[name] for figures in measured) for name in MEASURED}
    said = ", ".join(f"{FIGURE_NAMES[name]} {value:.1e}" for name, value in half.items())
    progress(f"half precision in this network: {said}")
    return Proof(tuple(parts), detections, tuple(ids), half)


def check_proof(proof: Proof, proto: onnx.ModelProto) -> None:
    """Hold the served graph, in ONNX Runtime, against one picture of each canvas. Raises ParityError."""
    session = probing_session(proto, plugins.onnxruntime_library())
    report = run_gate(
        lambda images, sizes: session.run(list(OUTPUTS), {"images": images, "sizes": sizes}),
        proof,
        "fp32",
        (1,),
        rounds=1,
    )
    if not report.passed:
        raise ParityError(f"the graph does not pass the proof made for it: {'; '.join(report.failures[:3])}")


def _untied(model: DeformableDetr, canvas: Canvas, index: int, first_seed: int) -> tuple[int, Answers, float]:
    """A seed for the picture at this index, PyTorch's answer, and how far (in logits) its proposals are from a tie."""
    best: tuple[int, Answers, float] | None = None
    for number, seed in enumerate(range(first_seed, first_seed + TRIES), start=1):
        answers, (margin,) = _answer(model, draw_pictures(canvas, (seed,) * (index + 1)), index)
        if best is None or margin > best[2]:
            best = seed, answers, margin
        if best[2] >= MARGIN or (number >= HOPELESS_AFTER and best[2] < MARGIN / 4):
            break
    assert best is not None
    return best


def _answer(model: DeformableDetr, pictures: Pictures, index: int) -> tuple[Answers, list[float]]:
    """PyTorch's answer to one of the pictures, alone: a batch of large ones takes gigabytes; and its margin."""
    return pytorch_answers(model, Batch(pictures.images[[index]], pictures.sizes[[index]]))


def _expected(answers: Answers, most: int, ids: Sequence[int]) -> Expected:
    """The best `most` candidates of the only picture, over queries x classes."""
    scores = answers.scores[0]  # [Q, classes]
    order = np.argsort(-scores.ravel(), kind="stable")[:most]
    query, label = np.divmod(order, scores.shape[1])
    return Expected(answers.boxes[0][query], scores.ravel()[order], np.asarray(ids, np.int64)[label])


def _signed(model: DeformableDetr, pictures: Pictures, index: int, want: Expected, ids: Sequence[int]) -> Expected:
    """With the signature of each known fault, zero for a candidate that the fault turns into another."""
    signatures = {}
    with _backbone_once(model):  # the faults are behind it
        for fault in SIGNATURES:
            with with_fault(fault):
                faulty = _expected(_answer(model, pictures, index)[0], len(want.scores), ids)
            pairs = match(Answer(faulty.boxes, faulty.scores, faulty.labels), want, limits_for("fp16"))
            moved = np.zeros_like(want.boxes)
            moved[pairs[:, 1]] = faulty.boxes[pairs[:, 0]] - want.boxes[pairs[:, 1]]
            signatures[fault] = moved
    return replace(want, signatures=signatures)


@contextmanager
def _backbone_once(model: DeformableDetr) -> Iterator[None]:
    """Within, the model sees one picture: its backbone, nearly half of a forward, computes the first time only."""
    forward = model.backbone.forward
    seen: list[list[Tensor]] = []

    def once(pixel_values: Tensor) -> list[Tensor]:
        if not seen:
            seen.append(forward(pixel_values))
        return seen[0]

    model.backbone.forward = once  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.backbone.forward  # the class's own again


def _half_errors(model: DeformableDetr, part: CanvasProof, detections: int, ids: Sequence[int]) -> dict[str, float]:
    """The figures of the median picture of one canvas, the network rounded to half precision."""
    rounded, pictures, limits = rounded_to_half(model), part.pictures(), limits_for("fp16")
    found = []
    for index, want in enumerate(part.expected):
        got = _expected(_answer(rounded, pictures, index)[0], detections, ids)
        found.append(compare(Answer(got.boxes, got.scores, got.labels), want, limits, detections, ids))
    return {name: float(np.median([getattr(figures, name) for figures in found])) for name in MEASURED}


def rounded_to_half(model: DeformableDetr) -> DeformableDetr:
    """A copy that computes in float32 and rounds where `export.precision.to_half` does: as exact, and not as slow."""
    model = copy.deepcopy(model)
    for layer in halved_layers(model):
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.half().to(parameter.dtype)
        layer.register_forward_pre_hook(lambda _layer, inputs: tuple(_rounded(value) for value in inputs))
        layer.register_forward_hook(lambda _layer, _inputs, output: _rounded(output))
    return model


def _rounded(value: Tensor | None) -> Tensor | None:
    return value if value is None or not value.is_floating_point() else value.half().to(value.dtype)
