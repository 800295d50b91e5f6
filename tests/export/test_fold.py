"""Batch norms folded into convolutions change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from export.fold import fold_batch_norms
from models.backbone import FrozenBatchNorm2d, ResNet
from tests.export.small import build, small


@pytest.mark.parametrize("variant", ["r50", "r50-single-scale-dc5"])
def test_the_backbone_is_the_same_function(variant: str) -> None:
    backbone = build(small(variant)).backbone
    assert isinstance(backbone, ResNet)
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        want = backbone(pixels)
        fold_batch_norms(backbone)
        got = backbone(pixels)
    assert not [module for module in backbone.modules() if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d)]
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-4)


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        fold_batch_norms(build(small("r50")).train())
