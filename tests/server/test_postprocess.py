import numpy as np
import pytest

from server.engine import RawImageDetections
from server.postprocess import postprocess

CATEGORIES = {1: "red", 2: "green"}
RAW = RawImageDetections(
    boxes=np.array(
        [[0.1, 0.2, 0.5, 0.6], [-0.1, -0.2, 1.3, 1.1], [1.1, 0.2, 1.2, 0.4], [0.5, 0.5, 0.9, 0.9]], np.float32
    ),
    scores=np.array([0.9, 0.8, 0.7, 0.5], np.float32),
    labels=np.array([1, 2, 1, 9], np.int64),
)


def test_boxes_are_scaled_and_clipped_to_the_picture() -> None:
    first, second, third = postprocess(RAW, 200, 100, CATEGORIES, threshold=0.5, max_detections=100)
    assert first.box_xyxy_px == pytest.approx((20, 20, 100, 60))
    assert second.box_xyxy_px == (0, 0, 200, 100)
    assert (first.label, first.class_id, first.score) == ("red", 1, pytest.approx(0.9))
    assert (third.label, third.class_id) == ("9", 9)  # a category without a name is called by its id


def test_threshold_includes_its_value() -> None:
    assert len(postprocess(RAW, 10, 10, CATEGORIES, threshold=0.5, max_detections=9)) == 3
    assert len(postprocess(RAW, 10, 10, CATEGORIES, threshold=0.51, max_detections=9)) == 2
    assert postprocess(RAW, 10, 10, CATEGORIES, threshold=1.0, max_detections=9) == []


def test_classes_are_chosen_before_the_best_are_counted() -> None:
    found = postprocess(RAW, 10, 10, CATEGORIES, threshold=0.0, max_detections=1, wanted_ids={2})
    assert [detection.class_id for detection in found] == [2]
    assert postprocess(RAW, 10, 10, CATEGORIES, threshold=0.0, max_detections=1, wanted_ids=set()) == []


def test_order_is_descending_even_if_the_engines_is_not() -> None:
    raw = RawImageDetections(RAW.boxes[::-1], RAW.scores[::-1], RAW.labels[::-1])
    scores = [found.score for found in postprocess(raw, 10, 10, CATEGORIES, threshold=0.0, max_detections=9)]
    assert scores == sorted(scores, reverse=True)


def test_no_detections_at_all() -> None:
    raw = RawImageDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    assert postprocess(raw, 10, 10, CATEGORIES, threshold=0.0, max_detections=9) == []


def test_equal_scores_keep_the_engines_order() -> None:
    raw = RawImageDetections(RAW.boxes, np.full(4, 0.5, np.float32), np.array([4, 3, 2, 1], np.int64))
    found = postprocess(raw, 10, 10, CATEGORIES, threshold=0.5, max_detections=9)
    assert [detection.class_id for detection in found] == [4, 3, 1]  # the third lies outside


def test_answers_are_pythons_numbers() -> None:
    (found, *_) = postprocess(RAW, 200, 100, CATEGORIES, threshold=0.5, max_detections=1)
    assert {type(value) for value in (found.score, *found.box_xyxy_px)} == {float}
    assert type(found.class_id) is int
    assert found.box_xyxy_px[0] == float(np.float32(0.1)) * 200
