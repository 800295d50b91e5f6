"""Pictures with something bright in them, and what an engine's double must answer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime import Answer
from tests.runtime.double import Plan, bright_boxes

Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]


def batch(seed: int, count: int, height: int = 64, width: int = 96) -> Batch:
    """Images of a canvas, filled to different sizes, with a bright box in each channel, and their sizes."""
    rng = np.random.default_rng(seed)
    images = np.zeros((count, height, width, 3), np.uint8)
    sizes = np.stack([rng.integers(height // 2, height, count), rng.integers(width // 2, width, count)], 1)
    for image, (h, w) in zip(images, sizes, strict=True):
        for channel in range(3):
            y, x = rng.integers(0, h - 8), rng.integers(0, w - 8)
            image[y : y + rng.integers(2, 8), x : x + rng.integers(2, 8), channel] = 200
    return images, sizes


def check(answer: Answer, given: Batch, plan: Plan | None = None) -> None:
    """The answer is that of these pictures."""
    plan = plan or Plan()
    boxes, scores, labels = bright_boxes(*given, plan.detections, plan)
    np.testing.assert_array_equal(answer.boxes, boxes)
    np.testing.assert_array_equal(answer.scores, scores)
    np.testing.assert_array_equal(answer.labels, labels)
