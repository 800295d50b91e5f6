"""Networks with the structure of every variant and nothing of its size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bundle import Canvas
from models import VARIANTS, DeformableDetr, DeformableDetrConfig, build_model

CANVASES = (Canvas(height=64, width=96), Canvas(height=96, width=64))
CATEGORY_IDS = (2, 3, 5, 7)
TRACED = [
    pytest.param(name, marks=pytest.mark.slow) if name in ("r50-single-scale", "r50-refine") else name
    for name in VARIANTS
]
"""Of each variant a graph is traced and verified, half a minute in all; what these two have, others have, too."""


def small(variant: str) -> DeformableDetrConfig:
    """A variant with its structure and nothing of its size; `r50` on basic blocks with trainable batch norm."""
    row = VARIANTS[variant]
    config = replace(
        row,
        backbone_depths=(1, 1, 1, 1),
        backbone_widths=(8, 8, 8, 8),
        hidden_dim=32,
        num_heads=4,
        num_feature_levels=min(2, row.num_feature_levels),
        num_encoder_layers=1,
        num_decoder_layers=2 if variant == "r50-refine" else 1,  # references of two numbers, then of four
        num_queries=12,
        num_classes=4,
        ffn_dim=32,
        resize_shortest=64,
        resize_longest=96,
    )
    if variant == "r50":
        config = replace(config, backbone_block="basic", backbone_norm="batch")
    if variant == "r50-refine":  # pictures so large that its decoder samples before it projects
        config = replace(config, resize_shortest=320, resize_longest=480)
    if variant == "r50-two-stage":
        config = replace(config, category_ids=CATEGORY_IDS, category_names=("a", "b", "c", "d"))
    return config


def build(config: DeformableDetrConfig, seed: int = 0) -> DeformableDetr:
    """Random weights everywhere, so that boxes, offsets and statistics are none of the neat initial ones."""
    torch.manual_seed(seed)
    model = build_model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            head = name.startswith(("class_embed", "bbox_embed")) or "attention_weights" in name
            parameter.add_(torch.randn_like(parameter) * (0.3 if head else 0.05))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(torch.randn_like(buffer) * 0.2)
            if name.endswith("running_var"):
                buffer.mul_(torch.rand_like(buffer) + 0.5)
    return model
