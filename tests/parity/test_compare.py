"""One answer against the one expected: what is a difference, and what is none."""

import numpy as np
import pytest

from parity.compare import Answer, compare, iou
from parity.limits import LIMITS, Limits, limits_for
from parity.proof import Expected

K, M = 40, 60
CATEGORIES = (1, 2, 3)
random = np.random.default_rng(0)
CORNER = random.uniform(0, 0.8, (M, 2))
WANT = Expected(
    np.concatenate([CORNER, CORNER + random.uniform(0.05, 0.2, (M, 2))], -1).astype(np.float32),
    np.sort(random.uniform(0.0, 0.6, M).astype(np.float32))[::-1],
    random.integers(1, 4, M),
    {"a fault": (random.normal(size=(M, 4)) * 1e-4).astype(np.float32)},
)


def right() -> Answer:
    return Answer(WANT.boxes[:K].copy(), WANT.scores[:K].copy(), WANT.labels[:K].copy())


def test_the_expected_answer_has_no_difference() -> None:
    figures = compare(right(), WANT, LIMITS["fp32"], K, CATEGORIES)
    assert (figures.faults, figures.strays, figures.box_max, figures.score_max, figures.curve) == ((), 0, 0, 0, 0)
    assert figures.agreement == 1
    assert figures.min_iou == pytest.approx(1)


def test_near_equal_scores_may_change_places() -> None:
    got = right()
    scores = WANT.scores.copy()
    scores[11] = scores[10] - 1e-6
    want = Expected(WANT.boxes, scores, WANT.labels)
    order = [*range(10), 11, 10, *range(12, K)]
    got = Answer(WANT.boxes[order], np.sort(scores[:K])[::-1], WANT.labels[order])
    figures = compare(got, want, LIMITS["fp32"], K, CATEGORIES)
    assert figures.strays == 0
    assert figures.box_max == 0


def test_a_tie_at_the_cut_may_fall_on_either_side() -> None:
    scores = WANT.scores.copy()
    scores[K] = scores[K - 1] - 1e-6
    want = Expected(WANT.boxes, scores, WANT.labels)
    order = [*range(K - 1), K]
    got = Answer(WANT.boxes[order], scores[order], WANT.labels[order])
    assert compare(got, want, LIMITS["fp32"], K, CATEGORIES).strays == 0


def test_a_detection_left_out_for_a_weaker_one_is_a_stray() -> None:
    order = [*range(5), *range(6, K + 1)]
    got = Answer(WANT.boxes[order], WANT.scores[order], WANT.labels[order])
    figures = compare(got, WANT, LIMITS["fp32"], K, CATEGORIES)
    assert figures.strays == 1
    assert figures.agreement < 1


def test_a_detection_twice_is_a_stray() -> None:
    got = right()
    got.boxes[6], got.labels[6] = got.boxes[5], got.labels[5]
    assert compare(got, WANT, LIMITS["fp16"], K, CATEGORIES).strays == 1


def test_a_wrong_label_is_a_stray_and_named_so() -> None:
    got = right()
    got.labels[5] = got.labels[5] % 3 + 1
    figures = compare(got, WANT, LIMITS["fp16"], K, CATEGORIES)
    assert (figures.strays, figures.mislabelled) == (1, 1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_errors_are_those_of_the_pairs(precision: str) -> None:
    limits = LIMITS[precision]
    got = right()
    got.boxes[:] += limits.pair_box / 4
    got.scores[:] -= limits.pair_score / 4
    figures = compare(got, WANT, limits, K, CATEGORIES)
    assert figures.strays == 0
    assert figures.box_median == pytest.approx(limits.pair_box / 4, rel=1e-2)
    assert figures.score_max == pytest.approx(limits.pair_score / 4, rel=1e-2)
    assert figures.curve == pytest.approx(limits.pair_score / 4, rel=1e-2)


def test_only_strong_detections_count_in_int8() -> None:
    got, limits = right(), LIMITS["int8"]
    weak = got.scores < limits.least_score - 0.01
    assert weak.any()
    got.boxes[weak] = 1 - got.boxes[weak][:, [2, 3, 0, 1]]
    figures = compare(got, WANT, limits, K, CATEGORIES)
    assert (figures.strays, figures.agreement) == (0, 1)
    strong = ~weak
    got.boxes[strong] = np.clip(1 - got.boxes[strong][:, [2, 3, 0, 1]], 0, 1)
    assert compare(got, WANT, limits, K, CATEGORIES).agreement < 0.7


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_the_signature_of_a_known_fault_is_found_below_noise_as_large(noise: float) -> None:
    spoilt = right()
    spoilt.boxes[:] += WANT.signatures["a fault"][:K]
    around = (np.random.default_rng(1).normal(size=(K, 4)) * noise).astype(np.float32)
    spoilt.boxes[:] += around
    figures = compare(spoilt, WANT, LIMITS["fp16"], K, CATEGORIES)
    assert figures.fault == "a fault"
    assert figures.signature > 0.6
    only_noise = right()
    only_noise.boxes[:] += around
    assert compare(only_noise, WANT, LIMITS["fp16"], K, CATEGORIES).signature < 0.25


FAULTS = {
    "boxes: of shape [20, 4], expected [40, 4]": lambda a: Answer(a.boxes[:20], a.scores, a.labels),
    "labels: of type float32, expected int64": lambda a: Answer(a.boxes, a.scores, a.labels.astype(np.float32)),
    "labels: of type int32, expected int64": lambda a: Answer(a.boxes, a.scores, a.labels.astype(np.int32)),
    "boxes: of type float16, expected float32": lambda a: Answer(a.boxes.astype(np.float16), a.scores, a.labels),
    "scores: of type float64, expected float32": lambda a: Answer(a.boxes, a.scores.astype(np.float64), a.labels),
    "scores: 1 not finite": lambda a: Answer(a.boxes, np.where(np.arange(K) == 3, np.nan, a.scores), a.labels),
    "boxes: 4 not finite": lambda a: Answer(np.where(np.arange(K)[:, None] == 3, np.inf, a.boxes), a.scores, a.labels),
    "scores: not descending": lambda a: Answer(a.boxes, a.scores[::-1], a.labels),
    "not in 0..1": lambda a: Answer(a.boxes, a.scores * 2, a.labels),
    "not within half an image": lambda a: Answer(a.boxes * 300, a.scores, a.labels),
    "40 with x1 < x0 or y1 < y0": lambda a: Answer(a.boxes[:, [2, 3, 0, 1]], a.scores, a.labels),
    "labels: unknown [0, 4]": lambda a: Answer(a.boxes, a.scores, np.where(a.labels == 1, 0, 4)),
}


@pytest.mark.parametrize("said", FAULTS)
def test_what_cannot_be_an_answer_is_a_fault(said: str) -> None:
    figures = compare(FAULTS[said](right()), WANT, LIMITS["fp32"], K, CATEGORIES)
    assert said in "; ".join(figures.faults)


def test_iou_of_boxes_without_area_is_one_or_nothing() -> None:
    boxes = np.array([[0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5]], np.float32)
    np.testing.assert_allclose(iou(boxes, boxes), [1, 1])
    np.testing.assert_allclose(iou(boxes[:1], np.array([[0.5, 0, 1.5, 1]], np.float32)), [1 / 3], rtol=1e-6)


def test_limits_follow_what_half_precision_was_measured_to_do() -> None:
    assert limits_for("fp16", {"box_median": 3e-5}).box_median == pytest.approx(1.2e-4)
    assert limits_for("fp16", {"box_median": 0.0}).box_median > 0
    assert limits_for("tf32", {"box_median": 3e-5}).box_median == pytest.approx(1.2e-4)
    assert limits_for("fp32", {"box_median": 3e-5}) == LIMITS["fp32"]
    assert limits_for("int8", {"box_median": 2e-3}).box_median == pytest.approx(3e-3)
    assert limits_for("int8", {}) == LIMITS["int8"]
    most = limits_for("int8", {"box_median": float("inf"), "score_median": 1.0, "curve": float("nan")})
    assert most.box_median == pytest.approx(1.2e-2)
    assert most.score_median == pytest.approx(0.075)
    assert most.curve < 1e-3
    with pytest.raises(ValueError, match="no limits for precision 'fp8'; there are fp32, fp16, int8, tf32"):
        limits_for("fp8")


def test_every_limit_is_a_number_above_nothing() -> None:
    for limits in LIMITS.values():
        assert isinstance(limits, Limits)
        assert min(limits.pair_box, limits.pair_score, limits.box_median, limits.score_median, limits.curve) > 0
