"""The sizes of pyramids against those that the networks make."""

from __future__ import annotations

import pytest
import torch

from bundle import Canvas
from export.pyramid import pyramid_pixels, usual_pixels
from models import VARIANTS
from tests.export.small import build, small


@pytest.mark.parametrize("variant", ["r50", "r50-single-scale", "r50-single-scale-dc5"])
def test_pixels_are_those_of_the_networks_maps(variant: str) -> None:
    config = small(variant)
    with torch.no_grad():
        maps = build(config)._pyramid(torch.zeros(1, 3, 100, 77))
    assert pyramid_pixels(Canvas(height=100, width=77), config) == sum(m.shape[2] * m.shape[3] for m in maps)


def test_the_usual_picture_is_the_papers() -> None:
    sides = [(100, 134), (50, 67), (25, 34), (13, 17)]  # of 800x1067
    assert usual_pixels(VARIANTS["r50"]) == sum(h * w for h, w in sides)
