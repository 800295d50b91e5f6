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


def sine_position(mask: Tensor, hidden_dim: int) -> Tensor:
    """Encode each pixel's centre within the filled part of its image.

    mask [N, H, W] bool, True = image -> [N, H, W, hidden_dim]: y in the first half of the channels, x in the second.
    Positions run over 0..2 pi. Source: Deformable-DETR's PositionEmbeddingSine, with its half-pixel shift.
    """
    filled = mask.to(torch.float32)
    y = filled.cumsum(1)
    x = filled.cumsum(2)
    y = (y - 0.5) / (y[:, -1:, :] + _EPS) * (2 * math.pi)
    x = (x - 0.5) / (x[:, :, -1:] + _EPS) * (2 * math.pi)
    frequencies = _frequencies(hidden_dim // 2, mask.device)
    return torch.cat([_interleave(axis[..., None] / frequencies) for axis in (y, x)], dim=-1)


def sine_box(boxes: Tensor, hidden_dim: int) -> Tensor:
    """Encode boxes [N, K, 4] (cx, cy, w, h in 0..1) as [N, K, 2*hidden_dim]: each number over hidden_dim/2 channels."""
    frequencies = _frequencies(hidden_dim // 2, boxes.device)
    return _interleave(boxes[..., None] * (2 * math.pi) / frequencies).flatten(-2)
