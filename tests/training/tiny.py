"""A network and data small enough to train in a second: drawn smears of 64x96 px in COCO's format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models import DeformableDetr, DeformableDetrConfig, build_model
from samples.coco import write_smears
from training.recipe import Recipe

TINY = DeformableDetrConfig(
    backbone_block="basic",
    backbone_depths=(1, 1, 1, 1),
    backbone_widths=(8, 8, 16, 32),
    hidden_dim=32,
    num_heads=4,
    num_encoder_layers=1,
    num_decoder_layers=2,
    ffn_dim=32,
    dropout=0.0,
    num_queries=20,
    num_classes=3,
    category_ids=(1, 2, 3),
    category_names=("RBC", "WBC", "Platelets"),
    resize_shortest=64,
    resize_longest=96,
)
TWO_STAGE = replace(TINY, with_box_refine=True, two_stage=True)
ALL_ON = replace(TWO_STAGE, dropout=0.2, backbone_norm="batch")  # whatever draws numbers or keeps statistics
FAST = Recipe(epochs=2, batch_size=2, lr=1e-3, lr_backbone=1e-3, freeze_stem=False)


def tiny_model(config: DeformableDetrConfig = TINY, seed: int = 0) -> DeformableDetr:
    """A network with the weights of this seed."""
    torch.manual_seed(seed)
    return build_model(config)


def write_data(folder: Path, train: int = 4, val: int = 2, height: int = 64, width: int = 96) -> Path:
    """A data set of `train` and `val` drawn smears under `folder`; returns the folder."""
    whole = json.loads(write_smears(folder, train + val, height=height, width=width).read_text())
    for split, ids in (("train", range(1, train + 1)), ("val", range(train + 1, train + val + 1))):
        write_annotations(folder, split, part(whole, set(ids)))
    return folder


def part(document: dict[str, Any], ids: set[int]) -> dict[str, Any]:
    """The images of these ids and what belongs to them."""
    return document | {
        "images": [image for image in document["images"] if image["id"] in ids],
        "annotations": [entry for entry in document["annotations"] if entry["image_id"] in ids],
    }


def write_annotations(folder: Path, split: str, document: Any) -> Path:
    """Write instances_{split}.json."""
    path = folder / f"instances_{split}.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path
