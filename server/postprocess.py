"""The engine's arrays to a list of detections in the picture's pixels."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

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
    # Few are kept: number by number costs less than numpy's calls do for arrays this small.
    kept = (raw.scores >= threshold).nonzero()[0].tolist()
    score_of, label_of = raw.scores.item, raw.labels.item
    found = []
    for index in sorted(kept, key=score_of, reverse=True):
        label = label_of(index)
        x0, y0, x1, y1 = [0.0 if side < 0 else 1.0 if side > 1 else side for side in raw.boxes[index].tolist()]
        if x1 > x0 and y1 > y0 and (wanted_ids is None or label in wanted_ids):
            box = (x0 * width, y0 * height, x1 * width, y1 * height)
            found.append(Detection(categories.get(label, str(label)), label, score_of(index), box))
            if len(found) == max_detections:
                break
    return found
