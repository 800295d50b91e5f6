"""How known faults of an engine move a network's boxes: what an engine's errors are searched for.

Where sampling coordinates are kept in half precision, boxes move by little more than in a right engine of half
precision, but always to the same sides: rounding a coordinate has nothing to do with chance.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import models.attention
from models.msda import sampling_locations

Moved = tuple[Tensor, Tensor]
"""reference_points and sampling_offsets of the op."""


def _half(x: Tensor) -> Tensor:
    return x.half().to(x.dtype)


def _reference_in_half(_shapes: Tensor, reference: Tensor, offsets: Tensor) -> Moved:
    return _half(reference), offsets


def _location_in_half(shapes: Tensor, reference: Tensor, offsets: Tensor) -> Moved:
    """Locations in 0..1 of a level."""
    return reference, _offsets_to(_half(sampling_locations(shapes, reference, offsets)), shapes, reference, offsets)


def _pixel_in_half(shapes: Tensor, reference: Tensor, offsets: Tensor) -> Moved:
    """Locations in pixels of a level, the first one's middle at 0."""
    side = shapes.flip(-1).to(reference.dtype)[:, None]  # [L, 1, 2] (w, h)
    pixel = _half(sampling_locations(shapes, reference, offsets) * side - 0.5)
    return reference, _offsets_to((pixel + 0.5) / side, shapes, reference, offsets)


def _grid_in_half(shapes: Tensor, reference: Tensor, offsets: Tensor) -> Moved:
    """Coordinates in -1..1 of the plane on which the op's function in the ONNX file lays all levels, two rows apart."""
    side = shapes.flip(-1).to(reference.dtype)  # [L, 2] (w, h)
    top = (side[:, 1] + 2).cumsum(0) - side[:, 1] - 2
    corner = torch.stack([torch.zeros_like(top), top], dim=-1)[:, None]  # [L, 1, 2]
    plane = torch.stack([side[:, 0].max(), (side[:, 1] + 2).sum()])
    grid = _half((sampling_locations(shapes, reference, offsets) * side[:, None] + corner) / plane * 2 - 1)
    locations = ((grid + 1) / 2 * plane - corner) / side[:, None]
    return reference, _offsets_to(locations, shapes, reference, offsets)


def _offsets_to(locations: Tensor, shapes: Tensor, reference: Tensor, offsets: Tensor) -> Tensor:
    """The offsets that lead to these locations."""
    apart = locations - reference[:, :, None, :, None, :2]
    if reference.shape[-1] == 2:
        return apart * shapes.flip(-1)[:, None].to(apart.dtype)
    moved: Tensor = apart * (2 * offsets.shape[-2]) / reference[:, :, None, :, None, 2:].clamp_min(1e-9)
    return moved


SIGNATURES: dict[str, Callable[[Tensor, Tensor, Tensor], Moved]] = {
    "reference points in half precision": _reference_in_half,
    "sampling locations in half precision": _location_in_half,
    "pixel coordinates in half precision": _pixel_in_half,
    "grid coordinates in half precision": _grid_in_half,
}


@contextmanager
def with_fault(name: str) -> Iterator[None]:
    """Within, every deformable attention of PyTorch in this process has the fault."""
    move, names = SIGNATURES[name], vars(models.attention)
    op = names["ms_deform_attn"]

    def faulty(value: Tensor, shapes: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        reference, offsets = move(shapes, reference, offsets)
        output: Tensor = op(value, shapes, reference.contiguous(), offsets.contiguous(), logits)
        return output

    names["ms_deform_attn"] = faulty
    try:
        yield
    finally:
        names["ms_deform_attn"] = op
