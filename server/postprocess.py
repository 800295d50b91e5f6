"""The engine's arrays to a list of detections in the picture's pixels."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from server.engine import RawImageDetections


class Detection(NamedTuple):
    """One object found."""

    label: str
    class_id: int
    score: float
    box_xyxy_px: tuple[float, float, float, float]  # x0, y0, x1, y1, inside the picture as displayed


def postprocess(
    raw: RawImageDetections,
    width: int,
    height: int,
    categories: Mapping[int, str],
    *,
    threshold: float,
    max_detections: int,
    wanted_ids: Collection[int] | None = None,
) -> list[Detection]:
    """Detections of at least `threshold` in a picture of `width` x `height` px, best first, clipped to the picture.

    `wanted_ids` are the category ids to keep; None keeps all. What lies outside the picture altogether is no detection.
    """
    kept = (raw.scores >= threshold).nonzero()[0]
    scores, labels = raw.scores[kept], raw.labels[kept]
    boxes = np.minimum(np.maximum(raw.boxes[kept], 0), 1) * np.array((width, height, width, height), np.float64)
    order = (-scores).argsort(kind="stable")
    found = []
    for label, score, (x0, y0, x1, y1) in zip(
        labels[order].tolist(), scores[order].tolist(), boxes[order].tolist(), strict=True
    ):
        if x1 > x0 and y1 > y0 and (wanted_ids is None or label in wanted_ids):
            found.append(Detection(categories.get(label, str(label)), label, score, (x0, y0, x1, y1)))
            if len(found) == max_detections:
                break
    return found
