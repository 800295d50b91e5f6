"""Multi-scale deformable attention: the op of the paper's equation 3, written for any device and for autograd.

Axes: N batch, S = sum of h_l*w_l, M heads, D channels of a head, Lq queries, L levels, P points of a level.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins import torch_cuda, torch_op

OUTSIDE = 3.0  # of a level that spans -1..1, however small its pixels are


def sampling_locations(spatial_shapes: Tensor, reference_points: Tensor, sampling_offsets: Tensor) -> Tensor:
    """Where each point samples, in 0..1 of its level (x, y): [N, Lq, M, L, P, 2], always float32 or wider.

    Around a point (R=2) an offset counts pixels of its level; around a box (R=4) it counts half the box over P.
    """
    offsets = sampling_offsets.to(reference_points.dtype)
    reference = reference_points[:, :, None, :, None, :]  # [N, Lq, 1, L, 1, R]
    if reference_points.shape[-1] == 2:
        wh = spatial_shapes.flip(-1).to(reference_points.dtype)  # [L, 2] (w, h)
        return reference + offsets / wh[None, None, None, :, None, :]
    points = sampling_offsets.shape[-2]
    return reference[..., :2] + offsets / points * reference[..., 2:] * 0.5


def reference_ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """The op in plain PyTorch (softmax, bilinear samples, weighted sum); it differentiates.

    value [N, S, M, D]; spatial_shapes [L, 2] int64 (h, w); reference_points [N, Lq, L, R], R 2 (x, y) or
    4 (cx, cy, w, h) in 0..1 with valid ratios applied; sampling_offsets [N, Lq, M, L, P, 2];
    attention_logits [N, Lq, M, L*P]. Returns [N, Lq, M*D] of value's type. Zeros outside a level, where also a
    location is that is not a number; align_corners=False. Raises ValueError where shapes disagree.
    """
    check_shapes(value, spatial_shapes, reference_points, sampling_offsets, attention_logits)
    batch, _, heads, channels = value.shape
    queries, levels, points = sampling_offsets.shape[1], sampling_offsets.shape[3], sampling_offsets.shape[4]
    locations = sampling_locations(spatial_shapes, reference_points, sampling_offsets)
    weights = attention_logits.to(locations.dtype).softmax(-1)  # [N, Lq, M, L*P]

    shapes = [(int(h), int(w)) for h, w in spatial_shapes.tolist()]
    maps = value.to(locations.dtype).split([h * w for h, w in shapes], dim=1)
    samples = []
    for level, (h, w) in enumerate(shapes):
        plane = maps[level].permute(0, 2, 3, 1).reshape(batch * heads, channels, h, w)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)  # [N*M, Lq, P, 2]
        grid = grid.nan_to_num(OUTSIDE, OUTSIDE, OUTSIDE)
        samples.append(F.grid_sample(plane, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    stacked = torch.stack(samples, dim=-2).flatten(-2)  # [N*M, D, Lq, L*P]
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    output = (stacked * weights).sum(-1).view(batch, heads * channels, queries)
    return output.transpose(1, 2).contiguous().to(value.dtype)  # [N, Lq, M*D]


def check_shapes(
    value: Tensor,
    spatial_shapes: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> None:
    """Raise a ValueError that names the first input whose shape disagrees with the others."""
    if value.dim() != 4:
        raise ValueError(f"value must be [N, S, M, D], got {list(value.shape)}")
    if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
        raise ValueError(f"spatial_shapes must be [L, 2], got {list(spatial_shapes.shape)}")
    batch, pixels, heads, _ = value.shape
    levels = spatial_shapes.shape[0]
    if sampling_offsets.dim() != 6:
        raise ValueError(f"sampling_offsets must be [N, Lq, M, L, P, 2], got {list(sampling_offsets.shape)}")
    queries, points = sampling_offsets.shape[1], sampling_offsets.shape[4]
    if levels < 1 or points < 1:
        raise ValueError(f"L={levels} levels of P={points} points: there must be at least one of each")
    if tuple(sampling_offsets.shape) != (batch, queries, heads, levels, points, 2):
        wanted = [batch, queries, heads, levels, points, 2]
        raise ValueError(f"sampling_offsets must be {wanted}, got {list(sampling_offsets.shape)}")
    if tuple(attention_logits.shape) != (batch, queries, heads, levels * points):
        wanted = [batch, queries, heads, levels * points]
        raise ValueError(f"attention_logits must be {wanted}, got {list(attention_logits.shape)}")
    if tuple(reference_points.shape[:-1]) != (batch, queries, levels) or reference_points.shape[-1] not in (2, 4):
        wanted_sides = f"[{batch}, {queries}, {levels}, 2 or 4]"
        raise ValueError(f"reference_points must be {wanted_sides}, got {list(reference_points.shape)}")
    total = 0
    for level, (h, w) in enumerate(spatial_shapes.tolist()):
        if h < 1 or w < 1:
            raise ValueError(f"level {level} of spatial_shapes is {[h, w]}, sides must be positive")
        total += h * w
        if total > pixels:
            raise ValueError(f"level {level} of spatial_shapes, {[h, w]}, reaches beyond the {pixels} pixels of value")
    if total < pixels:
        raise ValueError(f"spatial_shapes cover {total} pixels, value has {pixels}")


@torch.library.custom_op("msda::ms_deform_attn", mutates_args=())
def ms_deform_attn(
    value: Tensor, spatial_shapes: Tensor, reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor
) -> Tensor:
    """The op as the network calls it: the native kernel where it serves, else PyTorch. Arguments as the reference's.

    It is one opaque node in an exported graph. On a GPU its gradient is the reference's, computed anew from the inputs.
    """
    inputs = (value, spatial_shapes, reference_points, sampling_offsets, attention_logits)
    check_shapes(*inputs)
    if torch_op.serves(inputs):
        return torch_op.forward(inputs)
    if torch_cuda.serves(inputs):
        return torch_cuda.forward(inputs)
    return reference_ms_deform_attn(*inputs)


@ms_deform_attn.register_fake
def _(
    value: Tensor,
    spatial_shapes: Tensor,  # noqa: ARG001 - the op's signature
    reference_points: Tensor,  # noqa: ARG001
    sampling_offsets: Tensor,
    attention_logits: Tensor,  # noqa: ARG001
) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty((batch, sampling_offsets.shape[1], heads * channels))


@torch.library.custom_op("msda::ms_deform_attn_backward", mutates_args=())
def _gradients(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of value, reference_points, sampling_offsets and attention_logits, by the native kernel."""
    inputs = (value, spatial_shapes, reference_points, sampling_offsets, attention_logits)
    return torch_op.backward(grad_output, inputs)


@_gradients.register_fake
def _(
    grad_output: Tensor,  # noqa: ARG001 - the op's signature
    value: Tensor,
    spatial_shapes: Tensor,  # noqa: ARG001
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor in (value, reference_points, sampling_offsets, attention_logits)
    )
    return first, second, third, fourth


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001 - as PyTorch calls it
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    if torch_op.serves(inputs):
        grad_value, *rest = torch.ops.msda.ms_deform_attn_backward(grad_output, *inputs)
        return (grad_value, None, *rest)
    needed = [i for i, wanted in enumerate(ctx.needs_input_grad) if wanted]
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(i in needed) for i, tensor in enumerate(inputs)]
        output = reference_ms_deform_attn(*leaves)
        found = torch.autograd.grad(output, [leaves[i] for i in needed], grad_output)
    gradients = dict(zip(needed, found, strict=True))
    return tuple(gradients.get(i) for i in range(len(inputs)))


ms_deform_attn.register_autograd(_backward, setup_context=_keep)
