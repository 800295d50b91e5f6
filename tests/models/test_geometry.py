"""A rectangular mask's geometry, computed along its sides, is that of the mask."""

from __future__ import annotations

import pytest
import torch

from models import build_model
from models.geometry import mask_geometry, rectangle_geometry
from tests.models.seeded import seeded_batch
from tests.models.test_checkpoint import TINY, seeded


def masks(height: int, width: int, filled: list[tuple[int, int]]) -> torch.Tensor:
    mask = torch.zeros(len(filled), height, width, dtype=torch.bool)
    for slot, (h, w) in enumerate(filled):
        mask[slot, :h, :w] = True
    return mask


@pytest.mark.parametrize(
    ("height", "width", "filled"),
    [
        (64, 96, [(64, 96)]),
        (64, 96, [(50, 96), (64, 41), (33, 33)]),
        (100, 77, [(99, 70), (12, 77)]),  # no multiple of any stride
        (40, 40, [(1, 1)]),
    ],
)
def test_a_rectangle_is_told_by_its_sides(height: int, width: int, filled: list[tuple[int, int]]) -> None:
    random = torch.Generator().manual_seed(0)
    mask = masks(height, width, filled)
    maps = [torch.empty(len(filled), 32, -(-height // s), -(-width // s)) for s in (8, 16, 32)]
    embed = torch.randn(3, 32, generator=random)
    whole, sides = mask_geometry(mask, maps, embed), rectangle_geometry(mask, maps, embed)
    assert whole.spatial_shapes.tolist() == sides.spatial_shapes.tolist() == [list(m.shape[-2:]) for m in maps]
    assert torch.equal(whole.mask, sides.mask)
    assert torch.equal(whole.valid_ratios, sides.valid_ratios)
    assert torch.equal(whole.centres, sides.centres)
    assert torch.equal(whole.position[whole.mask], sides.position[whole.mask])
    assert sides.position.isfinite().all()  # in the padding, where it only must not spread


def test_the_network_answers_the_same_with_either() -> None:
    model = seeded(TINY)
    pixels, mask = seeded_batch(((64, 96), (40, 64)))
    with torch.no_grad():
        want = model(pixels, mask)
        model.geometry = rectangle_geometry
        got = model(pixels, mask)
    assert torch.equal(want["pred_logits"], got["pred_logits"])
    assert torch.equal(want["pred_boxes"], got["pred_boxes"])
    assert build_model(TINY).geometry is mask_geometry
