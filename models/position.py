"""Sine encodings: of pixels on a masked grid, and of boxes."""

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0
_EPS = 1e-6


def _frequencies(count: int, device: torch.device) -> Tensor:
    index = torch.arange(count, dtype=torch.float32, device=device)
    return TEMPERATURE ** (2 * torch.div(index, 2, rounding_mode="floor") / count)  # [count]


def _interleave(phase: Tensor) -> Tensor:
    """Sine of the even and cosine of the odd entries: [..., F] -> [..., F]."""
    return torch.stack((phase[..., 0::2].sin(), phase[..., 1::2].cos()), dim=-1).flatten(-2)


def sine_axis(filled: Tensor, dim: int, channels: int) -> Tensor:
    """Encode where each pixel lies along one axis of the filled part of its image.

    filled [N, ...], 1 = image; `dim` is the axis -> [N, ..., channels]. Positions run over 0..2 pi.
    """
    count = filled.cumsum(dim)
    total = count.narrow(dim, filled.shape[dim] - 1, 1)
    along = (count - 0.5) / (total + _EPS) * (2 * math.pi)
    return _interleave(along[..., None] / _frequencies(channels, filled.device))


def sine_position(mask: Tensor, hidden_dim: int) -> Tensor:
    """Encode each pixel's centre within the filled part of its image.

    mask [N, H, W] bool, True = image -> [N, H, W, hidden_dim]: y in the first half of the channels, x in the second.
    Source: Deformable-DETR's PositionEmbeddingSine, with its half-pixel shift.
    """
    filled = mask.to(torch.float32)
    return torch.cat([sine_axis(filled, dim, hidden_dim // 2) for dim in (1, 2)], dim=-1)


def sine_box(boxes: Tensor, hidden_dim: int) -> Tensor:
    """Encode boxes [N, K, 4] (cx, cy, w, h in 0..1) as [N, K, 2*hidden_dim]: each number over hidden_dim/2 channels."""
    frequencies = _frequencies(hidden_dim // 2, boxes.device)
    return _interleave(boxes[..., None] * (2 * math.pi) / frequencies).flatten(-2)
