"""AP by pycocotools: known answers, and annotation files that pycocotools alone would stumble over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training.average_precision import AveragePrecision, Detection, average_precision

CATEGORIES = [{"id": 4, "name": "cat"}, {"id": 2, "name": "Hündin"}]


def annotated(folder: Path, **extra: Any) -> Path:
    """Two images; a cat and a dog in the first, a cat in the second; their ids start from 0."""
    entries = [
        {"image_id": 1, "category_id": 4, "bbox": [10, 10, 50, 50]},
        {"image_id": 1, "category_id": 2, "bbox": [100, 20, 40, 60]},
        {"image_id": 2, "category_id": 4, "bbox": [0, 0, 120, 100]},
    ]
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 100} for i in (1, 2)],
        "annotations": [{"id": number} | extra | entry for number, entry in enumerate(entries)],
        "categories": CATEGORIES,
    }
    path = folder / "instances_val.json"
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return path


def perfect(path: Path) -> list[Detection]:
    entries = json.loads(path.read_text(encoding="utf-8"))["annotations"]
    return [{key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for entry in entries]


def test_perfect_detections_have_ap_1(tmp_path: Path) -> None:
    path = annotated(tmp_path)
    result = average_precision(path, perfect(path))
    assert (result.ap, result.ap50, result.ap75) == pytest.approx((1, 1, 1))
    assert result.small == -1  # there are none
    assert (result.medium, result.large) == pytest.approx((1, 1))
    assert result.by_class == {"Hündin": pytest.approx((1, 1)), "cat": pytest.approx((1, 1))}


def test_classes_are_scored_each_by_itself(tmp_path: Path) -> None:
    path = annotated(tmp_path)
    without_dog = [found for found in perfect(path) if found["category_id"] == 4]
    shifted = {"image_id": 1, "category_id": 2, "bbox": [100, 20, 40, 40], "score": 0.8}  # IoU 2/3
    assert average_precision(path, without_dog).by_class == {"Hündin": (0, 0), "cat": pytest.approx((1, 1))}
    result = average_precision(path, [*without_dog, shifted])
    assert result.by_class["Hündin"] == pytest.approx((0.4, 1.0))  # at IoU .50, .55, .60, .65 of ten
    assert result.ap == pytest.approx(0.7)


def test_a_wrong_detection_above_the_right_one_costs(tmp_path: Path) -> None:
    path = annotated(tmp_path)
    wrong = {"image_id": 2, "category_id": 2, "bbox": [5, 5, 20, 20], "score": 0.95}
    assert average_precision(path, [*perfect(path), wrong]).by_class["Hündin"] == pytest.approx((0.5, 0.5))


def test_no_detections_at_all(tmp_path: Path) -> None:
    result = average_precision(annotated(tmp_path), [])
    assert result == AveragePrecision(0, 0, 0, 0, 0, 0, {"Hündin": (0.0, 0.0), "cat": (0.0, 0.0)})


def test_area_and_iscrowd_are_used_where_they_are_given(tmp_path: Path) -> None:
    path = annotated(tmp_path, area=100, iscrowd=0)
    assert average_precision(path, perfect(path)).small == pytest.approx(1)


def test_crowds_are_neither_found_nor_missed(tmp_path: Path) -> None:
    path = annotated(tmp_path)
    document = json.loads(path.read_text(encoding="utf-8"))
    crowd = {"id": 77, "image_id": 2, "category_id": 2, "bbox": [50, 0, 100, 100], "iscrowd": 1}
    document["annotations"].append(crowd)
    path.write_text(json.dumps(document), encoding="utf-8")
    inside = {"image_id": 2, "category_id": 2, "bbox": [60, 10, 30, 30], "score": 0.95}
    found = [detection for detection in perfect(path) if detection["bbox"] != crowd["bbox"]]
    assert average_precision(path, [*found, inside]).ap == pytest.approx(1)


def test_the_table_has_every_class(tmp_path: Path) -> None:
    path = annotated(tmp_path)
    table = average_precision(path, perfect(path)).table()
    lines = [line.split() for line in table.splitlines()]
    assert lines[:4] == [
        ["AP", "AP50"],
        ["all", "1.000", "1.000"],
        ["Hündin", "1.000", "1.000"],
        ["cat", "1.000", "1.000"],
    ]
    assert "AP75 1.000" in table
