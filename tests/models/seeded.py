"""Weights and pictures that any program can make again: numbers from a seed and a tensor's name, nothing stored.

Drawn uniformly (a stream that NumPy has kept for years), scaled so that activations stay of order one, and far from
the initial weights: offsets, attention logits and heads all depend on the picture.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor, nn

SIZES = ((128, 160), (96, 112))  # (h, w) of the two pictures in a batch; the second is padded


def seeded_array(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Uniform float32 of variance one, drawn from the name's own stream."""
    drawn = np.random.default_rng([seed, zlib.crc32(name.encode())]).random(shape, dtype=np.float32)
    return (drawn - 0.5) * np.float32(12**0.5)


def seeded_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """The weights of a tensor with one of `DeformableDetr.state_dict()`'s names."""
    drawn = torch.from_numpy(seeded_array(name, shape, seed))
    if name.endswith("running_var"):
        return 1 + 0.2 * drawn
    if name.endswith("running_mean"):
        return 0.1 * drawn
    if name.endswith("sampling_offsets.bias"):
        return 2 * drawn
    if len(shape) == 1:
        if not name.endswith("weight"):
            return 0.1 * drawn
        # The last norm of a residual block is kept small, or 16 blocks would let the activations grow.
        return (0.3 if ".bn3." in name else 1) * (1 + 0.1 * drawn)
    if name.endswith(("level_embed", "query_embed.weight")):
        return drawn
    gain = 2 if len(shape) == 4 else 1  # ReLU follows the convolutions
    return drawn * (gain / (drawn.numel() / shape[0])) ** 0.5


def seed_weights(model: nn.Module, seed: int = 0) -> None:
    """Overwrite every weight and statistic of a DeformableDetr."""
    state = {name: seeded_tensor(name, tuple(tensor.shape), seed) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)


def seeded_batch(sizes: tuple[tuple[int, int], ...] = SIZES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """pixel_values [N, 3, H, W], zero beyond each picture, and pixel_mask [N, H, W], True within it."""
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    pixels, mask = torch.zeros(len(sizes), 3, height, width), torch.zeros(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        pixels[i, :, :h, :w] = torch.from_numpy(seeded_array(f"picture {i}", (3, h, w), seed))
        mask[i, :h, :w] = True
    return pixels, mask
