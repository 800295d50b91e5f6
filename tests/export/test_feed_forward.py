"""A linear layer over the channels is a pointwise convolution."""

from __future__ import annotations

import torch
from torch import nn

from export.feed_forward import feed_forward_as_convolutions
from tests.export.small import build, small

ATOL = 2e-6  # the same sums in another order


def test_the_encoder_is_the_same_function() -> None:
    model = build(small("r50"))
    (layer,) = model.transformer.encoder.layers
    x = torch.randn(2, 45, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = layer.linear2(torch.relu(layer.linear1(x)))
        feed_forward_as_convolutions(model)
        got = layer.linear2(torch.relu(layer.linear1(x)))
    assert not [module for module in (layer.linear1, layer.linear2) if isinstance(module, nn.Linear)]
    torch.testing.assert_close(got, want, atol=ATOL, rtol=1e-5)
