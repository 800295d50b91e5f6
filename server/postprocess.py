"""The engine's arrays to a list of detections in the picture's pixels."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from server.engine import RawImageDetections


@dataclass(frozen=True)
class Detection:
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
    keep = raw.scores >= threshold  # [K]
    if wanted_ids is not None:
        keep &= np.isin(raw.labels, list(wanted_ids))
    size = np.array([width, height, width, height], np.float64)
    boxes = np.clip(raw.boxes.astype(np.float64), 0.0, 1.0) * size  # [K, 4]
    keep &= (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    kept = np.flatnonzero(keep)
    kept = kept[np.argsort(-raw.scores[kept], kind="stable")][:max_detections]
    return [
        Detection(categories.get(label, str(label)), label, score, (box[0], box[1], box[2], box[3]))
        for label, score, box in zip(
            raw.labels[kept].tolist(), raw.scores[kept].tolist(), boxes[kept].tolist(), strict=True
        )
    ]
