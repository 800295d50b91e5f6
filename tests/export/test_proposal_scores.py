"""Proposals scored for one class are the proposals that all classes' scores choose."""

from __future__ import annotations

import pytest
import torch

from export.proposal_scores import score_one_class
from tests.export.small import build, small


@pytest.mark.parametrize("variant", ["r50-two-stage", "r50-refine"])
def test_the_answers_are_the_same(variant: str) -> None:
    model = build(small(variant)).eval()
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(pixels)
        score_one_class(model)
        got = model(pixels)
    for key in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(got[key], want[key], atol=1e-6, rtol=1e-5)
    assert len(model.class_embed[-1].weight) == (1 if variant == "r50-two-stage" else 4)
