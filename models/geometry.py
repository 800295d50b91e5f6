"""Where the pixels of every level lie: all the network knows of a batch before it looks at it.

Axes: N batch, L levels, S = sum of h_l*w_l, C channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.position import sine_axis, sine_position


@dataclass(frozen=True)
class Geometry:
    """The levels of a batch, the pixels of all of them below one another."""

    spatial_shapes: Tensor  # [L, 2] int64 (h, w)
    valid_ratios: Tensor  # [N, L, 2] (w, h): the filled share of a level
    masks: list[Tensor]  # of each level: [N, h_l*w_l] bool, True = image
    centres: Tensor  # [N, S, 2] (x, y) in 0..1 of the unpadded image
    position: Tensor  # [N, S, C]: sine encoding plus level embedding

    @property
    def mask(self) -> Tensor:
        """[N, S] bool, True = image."""
        return torch.cat(self.masks, dim=1)


def mask_geometry(pixel_mask: Tensor, maps: list[Tensor], level_embed: Tensor) -> Geometry:
    """Of any mask: pixel_mask [N, H, W] bool, maps [N, C, h_l, w_l] of each level, level_embed [L, C]."""
    masks = [F.interpolate(pixel_mask[:, None].float(), size=m.shape[-2:])[:, 0] > 0.5 for m in maps]  # [N, h, w]
    positions = [
        sine_position(mask, level_embed.shape[-1]).flatten(1, 2) + level_embed[level]
        for level, mask in enumerate(masks)
    ]
    edges = [(mask[:, :, 0].float(), mask[:, 0, :].float()) for mask in masks]
    return _geometry(maps, edges, [mask.flatten(1) for mask in masks], positions)


def rectangle_geometry(pixel_mask: Tensor, maps: list[Tensor], level_embed: Tensor) -> Geometry:
    """Of a mask that is a rectangle from the top left corner, as a served picture's is: computed along its two sides.

    As `mask_geometry`, to the last bit, but for the positions of padding: there both are arbitrary, because no value is
    ever read from a pixel outside the mask.
    """
    rows, columns = pixel_mask[:, :, 0].float(), pixel_mask[:, 0, :].float()  # [N, H], [N, W]
    half = level_embed.shape[-1] // 2
    edges, masks, positions = [], [], []
    for level, (h, w) in enumerate(m.shape[-2:] for m in maps):
        filled_rows = (F.interpolate(rows[:, None, :, None], size=(h, 1))[:, 0, :, 0] > 0.5).float()  # [N, h]
        filled_columns = (F.interpolate(columns[:, None, None], size=(1, w))[:, 0, 0] > 0.5).float()  # [N, w]
        edges.append((filled_rows, filled_columns))
        masks.append(((filled_rows[:, :, None] * filled_columns[:, None]) > 0.5).flatten(1))
        y = sine_axis(filled_rows, 1, half) + level_embed[level, :half]  # [N, h, C/2]
        x = sine_axis(filled_columns, 1, half) + level_embed[level, half:]  # [N, w, C/2]
        # One broadcast addition fills all channels: y has zeros where x speaks, and the other way round.
        position = F.pad(y, (0, half))[:, :, None] + F.pad(x, (half, 0))[:, None]  # [N, h, w, C]
        positions.append(position.flatten(1, 2))
    return _geometry(maps, edges, masks, positions)


def _geometry(
    maps: list[Tensor], edges: list[tuple[Tensor, Tensor]], masks: list[Tensor], positions: list[Tensor]
) -> Geometry:
    """From each level's first column [N, h] and first row [N, w] (1.0 = image), mask [N, h*w], position [N, h*w, C]."""
    return Geometry(
        spatial_shapes=_shapes_tensor(maps),
        valid_ratios=torch.stack([torch.stack([x.mean(-1), y.mean(-1)], dim=-1) for y, x in edges], dim=1),
        masks=masks,
        centres=torch.cat([pixel_centres(y, x) for y, x in edges], dim=1),
        position=torch.cat(positions, dim=1),
    )


def _shapes_tensor(maps: list[Tensor]) -> Tensor:
    """[L, 2] int64 (h, w); scalars are stacked so that a traced graph keeps them dynamic."""
    device = maps[0].device
    sides = [torch.scalar_tensor(side, dtype=torch.int64, device=device) for m in maps for side in m.shape[-2:]]
    return torch.stack(sides).view(-1, 2)


def pixel_centres(filled_rows: Tensor, filled_columns: Tensor) -> Tensor:
    """Each pixel's centre in 0..1 of the unpadded image: float [N, h] and [N, w], 1 = image -> [N, h*w, 2] (x, y).

    Divided by the count of filled pixels, to the last bit as the official code does it for proposals: whether the first
    of 50 rows (0.5 / 50) lies beyond the border of 0.01 hangs on that bit.
    """
    (n, h), w = filled_rows.shape, filled_columns.shape[1]
    y = torch.arange(h, dtype=torch.float32, device=filled_rows.device) + 0.5
    x = torch.arange(w, dtype=torch.float32, device=filled_rows.device) + 0.5
    y = y[None] / filled_rows.sum(-1, keepdim=True)  # [N, h]
    x = x[None] / filled_columns.sum(-1, keepdim=True)  # [N, w]
    grid = torch.stack([x[:, None, :].expand(n, h, w), y[:, :, None].expand(n, h, w)], dim=-1)
    return grid.flatten(1, 2)
