"""The two attentions of the transformer: deformable, and the decoder's ordinary self-attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.msda import ms_deform_attn


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its four projections (the paper's equation 3).

    Offsets start on rings: head m looks along angle 2 pi m / M, point p at distance p + 1, on every level.
    """

    def __init__(self, hidden_dim: int, num_levels: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.sampling_offsets = nn.Linear(hidden_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(hidden_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)

        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
        direction = torch.stack([angles.cos(), angles.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # on the unit square, [M, 2]
        distance = torch.arange(1, num_points + 1, dtype=torch.float32)
        ring = direction[:, None, None, :] * distance[None, None, :, None]  # [M, 1, P, 2]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(ring.repeat(1, num_levels, 1, 1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, query: Tensor, reference_points: Tensor, memory: Tensor, spatial_shapes: Tensor, memory_mask: Tensor
    ) -> Tensor:
        """Sample `memory` around the reference points of each query.

        query [N, Lq, C], reference_points [N, Lq, L, 2 or 4], memory [N, S, C], spatial_shapes [L, 2] (h, w),
        memory_mask [N, S] bool, True = image -> [N, Lq, C].
        """
        n, queries, _ = query.shape
        value = self.value_proj(memory) * memory_mask[..., None].to(memory.dtype)  # padding is zero, as outside a level
        value = value.view(n, memory.shape[1], self.num_heads, -1)  # [N, S, M, D]
        offsets = self.sampling_offsets(query).view(n, queries, self.num_heads, self.num_levels, self.num_points, 2)
        logits = self.attention_weights(query).view(n, queries, self.num_heads, self.num_levels * self.num_points)
        output: Tensor = self.output_proj(ms_deform_attn(value, spatial_shapes, reference_points, offsets, logits))
        return output


class SelfAttention(nn.Module):
    """Multi-head attention of the queries among themselves; parameters named and packed as nn.MultiheadAttention's."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_dim, hidden_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_dim))
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor, blocked: Tensor | None = None) -> Tensor:
        """x, position [N, Q, C], blocked [Q, Q] bool, True = unseen -> [N, Q, C]; values are without the position."""
        c = x.shape[-1]
        query, key = F.linear(x + position, self.in_proj_weight[: 2 * c], self.in_proj_bias[: 2 * c]).chunk(2, dim=-1)
        value = F.linear(x, self.in_proj_weight[2 * c :], self.in_proj_bias[2 * c :])
        heads = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value)]  # [N, M, Q, D]
        mask = None if blocked is None else ~blocked
        attended = F.scaled_dot_product_attention(
            heads[0], heads[1], heads[2], attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return output
