"""Sampling before the projection gives what projecting before the sampling gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from export.late_values import LateValues, project_values_late
from export.pyramid import usual_pixels
from models import VARIANTS
from tests.export.small import build, small

ATOL = 2e-6  # measured 3e-7: the same sums in another order


@pytest.mark.parametrize("reference_dim", [2, 4])
def test_the_order_changes_nothing(reference_dim: int) -> None:
    """With padding, samples outside and a bias: what lies outside the mask must take no share of the bias."""
    attention = build(small("r50")).transformer.decoder.layers[0].cross_attn
    random = torch.Generator().manual_seed(0)
    shapes, queries, c = [(6, 8), (3, 4)], 20, 32
    pixels = sum(h * w for h, w in shapes)
    query, memory = torch.randn(2, queries, c, generator=random), torch.randn(2, pixels, c, generator=random)
    reference = torch.rand(2, queries, len(shapes), reference_dim, generator=random) * 1.4 - 0.2
    mask = torch.rand(2, pixels, generator=random) > 0.3
    inputs = (query, reference, memory, torch.tensor(shapes), mask)
    with torch.no_grad():
        attention.value_proj.bias.normal_(generator=random)
        want, got = attention(*inputs), LateValues(attention)(*inputs)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, atol=ATOL, rtol=1e-5)


def test_only_where_it_is_less_work() -> None:
    model = build(small("r50"))
    samples = 12 * 4 * 2 * 4  # queries, heads, levels, points
    assert not project_values_late(model, pixels=40 * samples // 32 - 1)
    assert not [layer for layer in model.modules() if isinstance(layer, LateValues)]
    assert project_values_late(model, pixels=40 * samples // 32)
    assert all(isinstance(layer.cross_attn, LateValues) for layer in model.transformer.decoder.layers)


@pytest.mark.parametrize(("variant", "late"), [("r50", True), ("r50-single-scale", False), ("r50-two-stage", True)])
def test_which_of_the_papers_models_gain(variant: str, late: bool) -> None:
    config = replace(VARIANTS[variant], num_encoder_layers=0, num_decoder_layers=1, backbone_depths=(1, 1, 1, 1))
    assert project_values_late(build(config), usual_pixels(config)) == late
