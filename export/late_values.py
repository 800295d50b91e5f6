"""Decoder attention that samples first and projects afterwards: for few queries on many pixels the cheaper order."""

import torch
from torch import Tensor, nn

from models import DeformableDetr
from models.attention import MSDeformAttn
from models.msda import ms_deform_attn

# A pixel's projection costs C^2 multiply-adds of a matrix product; a sample of all C channels costs four corners'
# loads. The kernel is about this many times further from its machine's peak than the product is.
_SAMPLE_COST = 40
_ROOM = 16  # channels beside the memory's own: a vector's width, of which the mask takes one


def project_values_late(model: DeformableDetr, pixels: int) -> bool:
    """Let the decoder, in place, sample the memory itself, where that is less work on a memory of `pixels`; else False.

    Sampling and projection are both linear, so they may change places; each head's samples are then of all channels,
    and there is nothing to compute for the pixels that no query looks at.
    """
    config = model.config
    samples = config.num_queries * config.num_heads * config.num_feature_levels * config.num_decoder_points
    if pixels * config.hidden_dim < _SAMPLE_COST * samples:
        return False
    for layer in model.transformer.decoder.layers:
        attention = layer.cross_attn
        assert isinstance(attention, MSDeformAttn)
        layer.cross_attn = LateValues(attention)
    return True


class LateValues(nn.Module):
    """MSDeformAttn as a function of the same inputs, its value projection after the sampling.

    The op sees one head of C + 16 channels and a query for each head: the memory with a channel that is 1 inside the
    mask. That channel's sample is the share of the bias that the projection has to add.
    """

    def __init__(self, attention: MSDeformAttn) -> None:
        super().__init__()
        self.num_levels, self.num_heads = attention.num_levels, attention.num_heads
        self.num_points = attention.num_points
        self.sampling_offsets, self.attention_weights = attention.sampling_offsets, attention.attention_weights
        self.output_proj = attention.output_proj
        value_proj = attention.value_proj
        c = value_proj.in_features
        padded = torch.zeros(c, c + _ROOM)
        padded[:, :c], padded[:, c] = value_proj.weight.detach(), value_proj.bias.detach()
        by_head = padded.view(self.num_heads, -1, c + _ROOM).transpose(1, 2).contiguous()  # [M, C+16, D]
        self.value_weight = nn.Parameter(by_head, requires_grad=False)

    def forward(
        self, query: Tensor, reference_points: Tensor, memory: Tensor, spatial_shapes: Tensor, memory_mask: Tensor
    ) -> Tensor:
        """Shapes as MSDeformAttn's."""
        n, queries, _ = query.shape
        m, levels, points = self.num_heads, self.num_levels, self.num_points
        seen = memory_mask[..., None].to(memory.dtype)  # [N, S, 1]
        value = torch.cat([memory * seen, seen.expand(-1, -1, _ROOM)], dim=-1)[:, :, None]  # [N, S, 1, C+16]
        reference = reference_points[:, :, None].expand(-1, -1, m, -1, -1).flatten(1, 2)  # [N, Q*M, L, R]
        offsets = self.sampling_offsets(query).view(n, queries * m, 1, levels, points, 2)
        logits = self.attention_weights(query).view(n, queries * m, 1, levels * points)
        sampled = ms_deform_attn(value, spatial_shapes, reference, offsets, logits)  # [N, Q*M, C+16]
        by_head = sampled.view(n, queries, m, -1).transpose(1, 2) @ self.value_weight  # [N, M, Q, D]
        output: Tensor = self.output_proj(by_head.transpose(1, 2).flatten(2))
        return output
