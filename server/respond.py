"""Answers to bytes: JSON as the contract has it, a COCO dataset, or the picture with its boxes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import orjson

from bundle import Manifest
from server.errors import EngineFailed, ImageError, NothingReadable, ServiceError
from server.options import BoxFormat, DetectOptions, Units
from server.postprocess import Detection
from server.timing import StageTimes

Box: TypeAlias = tuple[float, float, float, float]

# Finer than any engine's error, and half the bytes of full precision.
_PIXEL_STEPS, _NORMALIZED_STEPS, _SCORE_STEPS = 1e3, 1e6, 1e6  # in 1


@dataclass(frozen=True)
class ImageAnswer:
    """What was found in one image."""

    width: int  # of the picture as displayed, px
    height: int
    detections: Sequence[Detection]
    times: StageTimes
    batch_size: int = 1


Outcome: TypeAlias = ImageAnswer | ServiceError
"""Of one image: its answer, or what stands in its place."""


def check_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Raise if there is no answer to give: a request's deadline passed, or none of its images has an answer."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, ServiceError)]
    for error in errors:
        if not isinstance(error, ImageError | EngineFailed):
            raise error
    if len(errors) < len(outcomes):
        return
    for error in errors:
        if len(errors) == 1 or isinstance(error, EngineFailed):
            raise error
    reasons = "; ".join(f"{index}: {error.message}" for index, error in enumerate(errors))
    message = f"none of {len(errors)} images could be read: {reasons}"
    raise type(errors[0])(message) if len({error.code for error in errors}) == 1 else NothingReadable(message)


def json_body(
    outcomes: Sequence[Outcome], manifest: Manifest, options: DetectOptions, request_id: str | None = None
) -> bytes:
    """`{"model", "images": [{"width", "height", "detections"}], "request_id"}` as UTF-8."""
    content: dict[str, Any] = {
        "model": {"name": manifest.model.name, "version": manifest.model.version},
        "images": [image_content(outcome, options) for outcome in outcomes],
    }
    if request_id is not None:
        content["request_id"] = request_id
    return orjson.dumps(content)


def image_content(outcome: Outcome, options: DetectOptions) -> dict[str, Any]:
    """One image's part of the JSON answer."""
    if isinstance(outcome, ServiceError):
        return error_content(outcome.code, outcome.message)
    return {
        "width": outcome.width,
        "height": outcome.height,
        "detections": [
            {
                "label": detection.label,
                "class_id": detection.class_id,
                "score": _round(detection.score, _SCORE_STEPS),
                "box": convert_box(
                    detection.box_xyxy_px, options.box_format, options.units, outcome.width, outcome.height
                ),
            }
            for detection in outcome.detections
        ],
    }


def coco_body(outcomes: Sequence[Outcome], categories: Mapping[int, str], file_names: Sequence[str] = ()) -> bytes:
    """A COCO dataset as UTF-8: images (ids from 0, in the request's order), categories, and annotations with scores.

    Its annotations by themselves are what COCO calls results. An image without an answer carries its error.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, outcome in enumerate(outcomes):
        image: dict[str, Any] = {"id": image_id}
        if image_id < len(file_names):
            image["file_name"] = file_names[image_id]
        images.append(image)
        if isinstance(outcome, ServiceError):
            image |= error_content(outcome.code, outcome.message)
            continue
        image |= {"width": outcome.width, "height": outcome.height}
        for detection in outcome.detections:
            box = convert_box(detection.box_xyxy_px, "xywh", "pixel", outcome.width, outcome.height)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": detection.class_id,
                    "bbox": box,
                    "area": _round(box[2] * box[3], _PIXEL_STEPS),
                    "iscrowd": 0,
                    "score": _round(detection.score, _SCORE_STEPS),
                }
            )
    named = [{"id": category_id, "name": name} for category_id, name in categories.items()]
    return orjson.dumps({"images": images, "categories": named, "annotations": annotations})


def error_content(code: str, message: str) -> dict[str, Any]:
    """`{"error": {"code", "message"}}`."""
    return {"error": {"code": code, "message": message}}


def convert_box(box_xyxy_px: Box, box_format: BoxFormat, units: Units, width: int, height: int) -> list[float]:
    """The box in the caller's format and units, rounded."""
    left, top, right, bottom = box_xyxy_px
    steps = _PIXEL_STEPS
    if units == "normalized":
        left, top, right, bottom = left / width, top / height, right / width, bottom / height
        steps = _NORMALIZED_STEPS
    if box_format == "xywh":
        right, bottom = right - left, bottom - top
    elif box_format == "cxcywh":
        left, top, right, bottom = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    # `_round`, without its call: there may be hundreds of boxes.
    return [
        int(left * steps + 0.5) / steps,
        int(top * steps + 0.5) / steps,
        int(right * steps + 0.5) / steps,
        int(bottom * steps + 0.5) / steps,
    ]


def _round(value: float, steps: float) -> float:
    """Of what is never negative, as `round` does it, in less than half the time."""
    return int(value * steps + 0.5) / steps
