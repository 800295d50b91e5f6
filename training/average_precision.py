"""COCO's average precision, by pycocotools, of detections against an annotation file."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Detection = dict[str, Any]
"""COCO's result format: image_id, category_id, bbox [x, y, width, height] in pixels, score."""


@dataclass(frozen=True)
class AveragePrecision:
    """AP over IoU .50 to .95, at .50 and .75, by object size (-1: none of that size), and (AP, AP50) by class name."""

    ap: float
    ap50: float
    ap75: float
    small: float
    medium: float
    large: float
    by_class: dict[str, tuple[float, float]]

    def table(self) -> str:
        """A few lines for a person."""
        lines = [f"{'':<16}{'AP':>7}{'AP50':>7}", f"{'all':<16}{self.ap:>7.3f}{self.ap50:>7.3f}"]
        lines += [f"{name:<16}{ap:>7.3f}{ap50:>7.3f}" for name, (ap, ap50) in self.by_class.items()]
        sizes = f"AP75 {self.ap75:.3f}   small {self.small:.3f}   medium {self.medium:.3f}   large {self.large:.3f}"
        return "\n".join([*lines, sizes])


def average_precision(annotations: Path, detections: list[Detection]) -> AveragePrecision:
    """Score detections (at most 100 of an image count) against a COCO annotation file."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _truth(annotations)
        categories = truth.loadCats(sorted(truth.getCatIds()))
        if not detections:
            return AveragePrecision(0, 0, 0, 0, 0, 0, {c["name"]: (0.0, 0.0) for c in categories})
        evaluation = COCOeval(truth, truth.loadRes([dict(d) for d in detections]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"]  # [IoU, recall, class, area, limit]

    def mean(values: np.ndarray) -> float:
        measured = values[values > -1]
        return float(measured.mean()) if measured.size else -1.0

    by_class = {
        c["name"]: (mean(precision[:, :, i, 0, -1]), mean(precision[0, :, i, 0, -1])) for i, c in enumerate(categories)
    }
    ap, ap50, ap75, small, medium, large = map(float, evaluation.stats[:6])
    return AveragePrecision(ap, ap50, ap75, small, medium, large, by_class)


def _truth(annotations: Path) -> COCO:
    """The file as pycocotools wants it: `area` and `iscrowd` there, ids from 1 (it takes a match with 0 for none)."""
    document = json.loads(annotations.read_text(encoding="utf-8"))
    truth = COCO()
    truth.dataset = {"info": {}} | document
    truth.dataset["annotations"] = [
        {"area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0} | entry | {"id": number}
        for number, entry in enumerate(document["annotations"], start=1)
    ]
    truth.createIndex()
    return truth
