"""The deformable encoder and decoder layers, and the stack of each."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.attention import MSDeformAttn, SelfAttention
from models.config import DeformableDetrConfig


class EncoderLayer(nn.Module):
    """Deformable self-attention of every pixel of every level, then a feed-forward network."""

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__()
        c = config.hidden_dim
        self.self_attn = MSDeformAttn(c, config.num_feature_levels, config.num_heads, config.num_encoder_points)
        self.norm1 = nn.LayerNorm(c)
        self.linear1 = nn.Linear(c, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, c)
        self.norm2 = nn.LayerNorm(c)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, position: Tensor, reference_points: Tensor, spatial_shapes: Tensor, mask: Tensor
    ) -> Tensor:
        """x, position [N, S, C], reference_points [N, S, L, 2], mask [N, S] -> [N, S, C]."""
        x = self.norm1(x + self.dropout(self.self_attn(x + position, reference_points, x, spatial_shapes, mask)))
        hidden = self.dropout(torch.relu(self.linear1(x)))
        output: Tensor = self.norm2(x + self.dropout(self.linear2(hidden)))
        return output


class Encoder(nn.Module):
    """The stack of encoder layers over the flattened pyramid."""

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))

    def forward(
        self, x: Tensor, position: Tensor, reference_points: Tensor, spatial_shapes: Tensor, mask: Tensor
    ) -> Tensor:
        """[N, S, C] -> memory [N, S, C]."""
        for layer in self.layers:
            x = layer(x, position, reference_points, spatial_shapes, mask)
        return x


class DecoderLayer(nn.Module):
    """Ordinary self-attention of the queries, deformable cross-attention into the memory, feed-forward."""

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__()
        c = config.hidden_dim
        self.cross_attn = MSDeformAttn(c, config.num_feature_levels, config.num_heads, config.num_decoder_points)
        self.norm1 = nn.LayerNorm(c)
        self.self_attn = SelfAttention(c, config.num_heads, config.dropout)
        self.norm2 = nn.LayerNorm(c)
        self.linear1 = nn.Linear(c, config.ffn_dim)
        self.linear2 = nn.Linear(config.ffn_dim, c)
        self.norm3 = nn.LayerNorm(c)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        spatial_shapes: Tensor,
        memory_mask: Tensor,
        blocked: Tensor | None,
    ) -> Tensor:
        """x, position [N, Q, C], reference_points [N, Q, L, 2 or 4], memory [N, S, C] -> [N, Q, C]."""
        x = self.norm2(x + self.dropout(self.self_attn(x, position, blocked)))
        attended = self.cross_attn(x + position, reference_points, memory, spatial_shapes, memory_mask)
        x = self.norm1(x + self.dropout(attended))
        hidden = self.dropout(torch.relu(self.linear1(x)))
        output: Tensor = self.norm3(x + self.dropout(self.linear2(hidden)))
        return output


class Decoder(nn.Module):
    """The stack of decoder layers; `refine` turns a layer's output and reference into the next layer's reference."""

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_decoder_layers))

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: Tensor,
        spatial_shapes: Tensor,
        valid_ratios: Tensor,
        memory_mask: Tensor,
        refine: Callable[[int, Tensor, Tensor], Tensor] | None,
        blocked: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return each layer's queries [N, Q, C] and the reference each layer started from, [N, Q, 2 or 4]."""
        hidden, references = [], []
        for index, layer in enumerate(self.layers):
            ratios = valid_ratios if reference.shape[-1] == 2 else torch.cat([valid_ratios, valid_ratios], dim=-1)
            reference_points = reference[:, :, None] * ratios[:, None]  # [N, Q, L, R]
            x = layer(x, position, reference_points, memory, spatial_shapes, memory_mask, blocked)
            hidden.append(x)
            references.append(reference)
            if refine is not None:
                reference = refine(index, x, reference).detach()  # no gradient from one layer's box to the one before
        return hidden, references
