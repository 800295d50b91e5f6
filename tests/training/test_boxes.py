"""Boxes: the two layouts are each other's inverse, and overlaps agree with counting by hand."""

from __future__ import annotations

import pytest
import torch

from training.boxes import cxcywh_to_xyxy, overlaps, xyxy_to_cxcywh


def test_layouts_are_inverse() -> None:
    corners = torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.0, 0.0, 1.0, 1.0]])
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(corners)), corners)
    torch.testing.assert_close(xyxy_to_cxcywh(corners)[0], torch.tensor([0.3, 0.55, 0.4, 0.7]))


@pytest.mark.parametrize(
    ("a", "b", "iou", "giou"),
    [
        ([0, 0, 2, 2], [0, 0, 2, 2], 1.0, 1.0),
        ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7, 1 / 7 - 2 / 9),
        ([0, 0, 1, 1], [2, 0, 3, 1], 0.0, -1 / 3),
        ([0, 0, 2, 2], [0, 0, 1, 1], 0.25, 0.25),
        ([1, 1, 1, 1], [1, 1, 1, 1], 0.0, 0.0),  # two empty boxes: finite
    ],
)
def test_overlaps_by_hand(a: list[float], b: list[float], iou: float, giou: float) -> None:
    got = overlaps(torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32))
    assert [float(value) for value in got] == pytest.approx([iou, giou])


def test_overlaps_broadcast() -> None:
    iou, giou = overlaps(torch.rand(5, 1, 4).sort(-1).values, torch.rand(1, 3, 4).sort(-1).values)
    assert iou.shape == giou.shape == (5, 3)
