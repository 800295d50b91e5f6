"""Deformable DETR, whole: backbone, pyramid, encoder, (proposals,) decoder, heads. Source: arXiv 2010.04159."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.backbone import ResNet
from models.config import DeformableDetrConfig
from models.geometry import Geometry, mask_geometry
from models.position import sine_box
from models.transformer import Decoder, Encoder

PRIOR_PROBABILITY = 0.01  # focal loss starts from rare objects
PROPOSAL_SIZE = 0.05  # a proposal's side on the finest level, of the image's; doubled on each level


@dataclass(frozen=True)
class ExtraQueries:
    """Queries that training adds before the model's own (denoising): they are answered apart, under `extra`.

    content [N, E, C]; boxes [N, E, 4] cx, cy, w, h in 0..1; blocked [E+Q, E+Q] bool, True = attention forbidden.
    Only for two-stage models, whose queries are boxes.
    """

    content: Tensor
    boxes: Tensor
    blocked: Tensor


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """The logit of x, x first clamped to 0..1 and its sides kept eps away from zero."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class BoxHead(nn.Module):
    """Three linear layers from a query to a box's four logits."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        layers = [nn.Linear(hidden_dim, hidden_dim if i < 2 else 4) for i in range(3)]
        nn.init.zeros_(layers[2].weight)
        nn.init.zeros_(layers[2].bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """[N, Q, C] -> [N, Q, 4]."""
        for index, layer in enumerate(self.layers):
            x = layer(x) if index == 2 else torch.relu(layer(x))
        return x


class Transformer(nn.Module):
    """The paper's transformer without its heads: level embedding, encoder, decoder, and where queries come from."""

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__()
        c = config.hidden_dim
        self.level_embed = nn.Parameter(torch.randn(config.num_feature_levels, c))
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.two_stage:
            self.enc_output = nn.Linear(c, c)
            self.enc_output_norm = nn.LayerNorm(c)
            self.pos_trans = nn.Linear(2 * c, 2 * c)
            self.pos_trans_norm = nn.LayerNorm(2 * c)
        else:
            self.reference_points = nn.Linear(c, 2)
        for name, parameter in self.named_parameters():
            # The projections of MSDeformAttn start in their own way, and a level's embedding from a normal.
            own = ("sampling_offsets", "attention_weights", "level_embed")
            if parameter.dim() > 1 and not any(word in name for word in own):
                nn.init.xavier_uniform_(parameter)
        if not config.two_stage:
            nn.init.zeros_(self.reference_points.bias)


class DeformableDetr(nn.Module):
    """The detector of the paper, in any of its variants (`DeformableDetrConfig`)."""

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__()
        self.config = config
        c = config.hidden_dim
        self.backbone = ResNet(config)
        self.input_proj = self._input_projections()
        # Another function may be put here that does less for the masks it is sure to get.
        self.geometry: Callable[[Tensor, list[Tensor], Tensor], Geometry] = mask_geometry
        self.transformer = Transformer(config)
        if not config.two_stage:
            self.query_embed = nn.Embedding(config.num_queries, 2 * c)

        heads = 1 if not config.with_box_refine else config.num_decoder_layers + config.two_stage
        class_heads = [nn.Linear(c, config.num_classes) for _ in range(heads)]
        for head in class_heads:
            nn.init.constant_(head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        self.class_embed = nn.ModuleList(class_heads)
        self.bbox_embed = nn.ModuleList(BoxHead(c) for _ in range(heads))
        if not config.two_stage:
            first_bias = self.get_parameter("bbox_embed.0.layers.2.bias")
            nn.init.constant_(first_bias[2:], -2.0)  # w and h near 0.1

    def _input_projections(self) -> nn.ModuleList:
        """1x1 from C3, C4, C5 (or C5 alone), 3x3 of stride 2 for the levels beyond; GroupNorm(32) after each."""
        levels, c = self.config.num_feature_levels, self.config.hidden_dim
        channels = self.backbone.num_channels[1:] if levels > 1 else self.backbone.num_channels[-1:]
        channels = channels[:levels]
        projections = [nn.Conv2d(width, c, 1) for width in channels]
        width = channels[-1]
        for _ in range(levels - len(channels)):
            projections.append(nn.Conv2d(width, c, 3, stride=2, padding=1))
            width = c
        for conv in projections:
            nn.init.xavier_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        return nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(32, c)) for conv in projections)

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, extra: ExtraQueries | None = None
    ) -> dict[str, object]:
        """Detect.

        pixel_values [N, 3, H, W] float32, normalised, zero outside the image; pixel_mask [N, H, W] bool, True = image
        (None: all of it). Returns `pred_logits` [N, Q, num_classes] before the sigmoid and `pred_boxes` [N, Q, 4]
        (cx, cy, w, h in 0..1 of the unpadded image); in training mode also `aux_outputs` (the same two of each earlier
        layer), `enc_outputs` for two-stage models (of every pixel), and `extra` when extra queries were given.
        """
        if pixel_mask is None:
            n, _, h, w = pixel_values.shape
            pixel_mask = torch.ones((n, h, w), dtype=torch.bool, device=pixel_values.device)
        maps = self._pyramid(pixel_values)
        geometry = self.geometry(pixel_mask, maps, self.transformer.level_embed)
        spatial_shapes, valid_ratios, mask = geometry.spatial_shapes, geometry.valid_ratios, geometry.mask
        # Channels last, level by level: a runtime then reorders each map once, where its convolution writes it.
        x = torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in maps], dim=1)  # [N, S, C]
        reference_points = geometry.centres[:, :, None] * valid_ratios[:, None]  # [N, S, L, 2]
        memory = self.transformer.encoder(x, geometry.position, reference_points, spatial_shapes, mask)

        outputs: dict[str, object] = {}
        if self.config.two_stage:
            content, query_position, reference = self._proposals(memory, geometry, outputs)
        else:
            query_position, content = self.query_embed.weight.chunk(2, dim=-1)
            n = memory.shape[0]
            query_position = query_position.expand(n, -1, -1)
            content = content.expand(n, -1, -1)
            reference = self.transformer.reference_points(query_position).sigmoid()  # [N, Q, 2]
        if extra is not None:
            extra_position, _ = self._box_queries(extra.boxes)
            content = torch.cat([extra.content, content], dim=1)
            query_position = torch.cat([extra_position, query_position], dim=1)
            reference = torch.cat([extra.boxes, reference], dim=1)

        hidden, references = self.transformer.decoder(
            content,
            query_position,
            reference,
            memory,
            spatial_shapes,
            valid_ratios,
            mask,
            refine=self._box if self.config.with_box_refine else None,
            blocked=None if extra is None else extra.blocked,
        )
        every = range(len(hidden)) if self.training else [len(hidden) - 1]
        layers = [
            {
                "pred_logits": self._head(self.class_embed, i)(hidden[i]),
                "pred_boxes": self._box(i, hidden[i], references[i]),
            }
            for i in every
        ]
        if extra is not None:
            count = extra.boxes.shape[1]
            outputs["extra"] = [{key: value[:, :count] for key, value in layer.items()} for layer in layers]
            layers = [{key: value[:, count:] for key, value in layer.items()} for layer in layers]
        outputs.update(layers[-1])
        if self.training:
            outputs["aux_outputs"] = layers[:-1]
        return outputs

    def _pyramid(self, pixel_values: Tensor) -> list[Tensor]:
        """The feature maps of every level, each [N, C, h_l, w_l]."""
        maps = self.backbone(pixel_values)
        sources = maps[1:] if self.config.num_feature_levels > 1 else maps[-1:]
        pyramid = [proj(source) for proj, source in zip(self.input_proj, sources, strict=False)]
        source = sources[-1]
        for index in range(len(pyramid), self.config.num_feature_levels):
            pyramid.append(self.input_proj[index](source))  # C6 from C5 itself, C7 from C6
            source = pyramid[-1]
        return pyramid

    def _head(self, heads: nn.ModuleList, layer: int) -> nn.Module:
        """The head of a decoder layer: its own with refinement, the shared one without."""
        return heads[layer if self.config.with_box_refine else 0]

    def _box(self, layer: int, hidden: Tensor, reference: Tensor) -> Tensor:
        """Boxes [N, Q, 4] in 0..1 that correct the reference [N, Q, 2 or 4] a layer started from."""
        delta: Tensor = self._head(self.bbox_embed, layer)(hidden)
        logits = inverse_sigmoid(reference)
        if reference.shape[-1] == 4:
            return (delta + logits).sigmoid()
        return torch.cat([delta[..., :2] + logits, delta[..., 2:]], dim=-1).sigmoid()

    def _proposals(
        self, memory: Tensor, geometry: Geometry, outputs: dict[str, object]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Two-stage: the best-scored pixels of the memory become the queries and their first boxes."""
        sides = torch.cat(
            [torch.full_like(m, PROPOSAL_SIZE * 2.0**i, dtype=torch.float32) for i, m in enumerate(geometry.masks)],
            dim=1,
        )
        proposals = torch.cat([geometry.centres, sides[..., None], sides[..., None]], dim=-1)  # [N, S, 4]
        inside = ((proposals > 0.01) & (proposals < 0.99)).all(-1) & geometry.mask  # [N, S]
        logits = torch.log(proposals / (1 - proposals))
        logits = logits.masked_fill(~inside[..., None], float("inf"))

        transformer = self.transformer
        encoded = transformer.enc_output_norm(transformer.enc_output(memory * inside[..., None].to(memory.dtype)))
        scores = self.class_embed[-1](encoded)
        # The official code ranks proposals by the first class alone: its encoder is trained on "object or not".
        best = scores[..., 0].topk(self.config.num_queries, dim=1).indices[..., None]  # [N, Q, 1]
        if self.training:
            boxes = self.bbox_embed[-1](encoded) + logits  # before the sigmoid
            outputs["enc_outputs"] = {"pred_logits": scores, "pred_boxes": boxes.sigmoid()}
            boxes = boxes.gather(1, best.expand(-1, -1, 4))
        else:  # the other pixels' boxes are of no use
            chosen = encoded.gather(1, best.expand(-1, -1, encoded.shape[-1]))  # [N, Q, C]
            boxes = self.bbox_embed[-1](chosen) + logits.gather(1, best.expand(-1, -1, 4))
        reference = boxes.detach().sigmoid()
        position, content = self._box_queries(reference)
        return content, position, reference

    def _box_queries(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """A box [N, K, 4] as a query: its position and its content, each [N, K, C]."""
        encoded = sine_box(boxes, self.config.hidden_dim)
        position, content = self.transformer.pos_trans_norm(self.transformer.pos_trans(encoded)).chunk(2, dim=-1)
        return position, content


def build_model(config: DeformableDetrConfig) -> DeformableDetr:
    """A network with fresh weights, initialised as the official code does."""
    return DeformableDetr(config)
