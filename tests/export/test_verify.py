"""What parity accepts, and what it refuses by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import plugins
from bundle import Canvas, ParityRecord
from export import verify as verification
from export.verify import (
    FILLS,
    MAX_SCORE_ERROR,
    Answers,
    ParityError,
    check_top,
    draw_pictures,
    query_errors,
    verify,
)
from tests.export.conftest import Exported
from tests.export.small import CANVASES, small


def answers(seed: int, queries: int = 6, classes: int = 3) -> Answers:
    random = np.random.default_rng(seed)
    return Answers(
        scores=random.random((1, queries, classes), dtype=np.float32),
        boxes=random.random((1, queries, 4), dtype=np.float32),
    )


def nudged(model: onnx.ModelProto, name: str, by: float) -> onnx.ModelProto:
    """The model with one number of one of its weights changed."""
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] += by
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return model


@pytest.mark.parametrize("name", ["scores", "boxes"])
def test_a_changed_weight_is_a_parity_error(exported: Callable[[str], Exported], name: str) -> None:
    done = exported("r50-two-stage")
    proto = done.proto()
    bias = {"scores": "model.class_embed.0.bias", "boxes": "model.bbox_embed.0.layers.2.bias"}[name]
    what = {"scores": "score error", "boxes": "box error"}[name]
    with pytest.raises(
        ParityError, match=rf"^{what} 0\.\d+ exceeds 0\.001 \(canvas 64x96, batch of 1, slot 0, onnxruntime\)$"
    ):
        verify(done.model, nudged(proto, bias, 0.5), CANVASES)


@pytest.mark.skipif(plugins.onnxruntime_library() is None, reason="the native kernel is not built")
def test_the_kernel_is_verified_too(exported: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose answers are another model's, while the function's are right."""
    done = exported("r50-two-stage")
    proto = done.proto()
    wrong = nudged(done.proto(), "model.class_embed.0.bias", 0.5)
    real = verification.probing_session

    def session(_: onnx.ModelProto, library: Path | None = None) -> onnxruntime.InferenceSession:
        return real(proto) if library is None else real(wrong, library)

    records: list[ParityRecord] = []
    monkeypatch.setattr(verification, "probing_session", session)
    with pytest.raises(ParityError, match=r"^score error .*, slot 0, onnxruntime\+msda\)$"):
        verify(done.model, proto, CANVASES, records.append)
    assert not records


def test_without_a_kernel_the_function_is_verified(
    exported: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = exported("r50-two-stage")
    monkeypatch.setattr(plugins, "onnxruntime_library", lambda: None)
    assert {record.engine for record in verify(done.model, done.proto(), CANVASES[:1])} == {"onnxruntime"}


def test_a_small_error_is_not_rounded_away(exported: Callable[[str], Exported]) -> None:
    """0.02 on a logit is 0.005 on a score at most: five times the limit, and caught."""
    done = exported("r50-two-stage")
    with pytest.raises(ParityError, match="score error"):
        verify(done.model, nudged(done.proto(), "model.class_embed.0.bias", 0.02), CANVASES)


def test_equal_queries_in_another_order_are_equal() -> None:
    want = answers(0)
    order = np.array([0, 2, 1, 3, 5, 4])
    assert query_errors(want, Answers(want.scores[:, order], want.boxes[:, order]), 0) == (0.0, 0.0)


def test_a_query_is_paired_once() -> None:
    """Two queries that say the same, where PyTorch has two that differ."""
    want = answers(1)
    scores, boxes = want.scores.copy(), want.boxes.copy()
    scores[0, 1], boxes[0, 1] = scores[0, 0], boxes[0, 0]
    assert query_errors(want, Answers(scores, boxes), 0)[1] > MAX_SCORE_ERROR


def test_nan_does_not_pass() -> None:
    want = answers(2)
    boxes = want.boxes.copy()
    boxes[0, 3] = np.nan
    box, _ = query_errors(want, Answers(want.scores, boxes), 0)
    assert not box <= 1e9


def top(raw: Answers, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    index = np.argsort(-raw.scores[0].ravel())[:count]
    query, label = np.divmod(index, raw.scores.shape[-1])
    return raw.boxes[0, query], raw.scores[0].ravel()[index], label


def test_the_top_k_is_held_against_the_queries() -> None:
    raw, config = answers(3), replace(small("r50"), num_classes=3)
    boxes, scores, labels = top(raw, 5)
    check_top(boxes, scores, labels, raw, 0, config, "here")
    with pytest.raises(ParityError, match=r"order of the top scores.*\(here\)"):
        check_top(boxes[1:], scores[1:], labels[1:], raw, 0, config, "here")
    with pytest.raises(ParityError, match="detection 0 is no query's own"):
        check_top(boxes[::-1], scores, labels, raw, 0, config, "here")
    with pytest.raises(ParityError, match="detection 2 has category 9"):
        check_top(boxes, scores, np.array([*labels[:2], 9, *labels[3:]]), raw, 0, config, "here")


def test_one_query_is_not_reported_twice() -> None:
    raw, config = answers(4), replace(small("r50"), num_classes=3)
    raw.scores[0, 1] = raw.scores[0, 0]  # a tie of two queries with different boxes
    boxes, scores, labels = top(raw, 18)
    check_top(boxes, scores, labels, raw, 0, config, "here")
    boxes[labels == 0] = np.where(
        (scores[labels == 0] == raw.scores[0, 0, 0])[:, None], raw.boxes[0, 0], boxes[labels == 0]
    )
    with pytest.raises(ParityError, match="no query's own"):
        check_top(boxes, scores, labels, raw, 0, config, "here")


def test_pictures_are_padded_with_zeros_and_fill_unevenly() -> None:
    pictures = draw_pictures(Canvas(height=64, width=96), FILLS, seed=3)
    assert pictures.images.dtype == np.uint8
    assert len({tuple(size) for size in pictures.sizes.tolist()}) == len(FILLS)
    for image, (h, w) in zip(pictures.images, pictures.sizes, strict=True):
        assert not image[h:].any()
        assert not image[:, w:].any()
        assert image[:h, :w].std() > 20
    assert np.array_equal(pictures.images, draw_pictures(Canvas(height=64, width=96), FILLS, seed=3).images)
