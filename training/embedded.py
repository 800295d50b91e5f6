"""The embedded model, trained anew with one command: `python -m training.embedded --data DIR --output DIR`."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from models import DeformableDetrConfig, build_model
from samples import draw_smear
from training.augment import FixedAugment, Sample
from training.coco import DataError, read_split
from training.dataset import CocoDataset
from training.recipe import Recipe
from training.trainer import Processes, Trainer

CONFIG = DeformableDetrConfig(
    backbone_block="basic",
    backbone_depths=(2, 2, 2, 1),
    backbone_widths=(32, 64, 128, 256),
    backbone_norm="batch",
    hidden_dim=128,
    num_encoder_points=3,
    num_encoder_layers=2,
    num_decoder_layers=4,
    ffn_dim=512,
    dropout=0.0,
    num_queries=100,
    num_classes=3,
    with_box_refine=True,
    two_stage=True,
    category_ids=(1, 2, 3),
    category_names=("RBC", "WBC", "Platelets"),
    resize_shortest=288,
    resize_longest=384,
)
RECIPE = Recipe(
    epochs=180,
    batch_size=8,
    lr=4e-4,
    lr_backbone=4e-4,
    clip_norm=1.0,
    schedule="cosine",
    drop_at=0.65,
    warmup_steps=100,
    ema_decay=0.998,
    quality_targets=True,
    precision="bf16",
    denoising_groups=2,
    evaluate_every=5,
    freeze_stem=False,
)
AUGMENT = FixedAugment(height=CONFIG.resize_shortest, width=CONFIG.resize_longest)
CALM = replace(AUGMENT, scales=(0.85, 1.1), colour=0.15, mosaic=0.0, turn=0.0)
CALM_EPOCHS = 40  # the last ones, on pictures nearly as they are
DRAWN_SHARE = 0.1  # of the pictures, so that the model works on drawn smears, too
BOX_MARGIN = 1.06  # the data's boxes are looser than the drawn cells by about this


def drawn_smear(rng: np.random.Generator) -> Sample:
    """A synthetic smear at a random seed, its boxes as loose as a person draws them."""
    smear = draw_smear(int(rng.integers(2**31)))
    centre = (smear.boxes[:, :2] + smear.boxes[:, 2:]) / 2
    half = (smear.boxes[:, 2:] - smear.boxes[:, :2]) / 2 * BOX_MARGIN
    height, width = smear.image.shape[:2]
    low = (centre - half).clip(0)
    high = np.minimum(centre + half, np.array([width, height], dtype=np.float32))
    classes = np.searchsorted(CONFIG.category_ids, smear.category_ids)
    return Sample(smear.image, np.concatenate([low, high], axis=1).astype(np.float32), classes)


def main(argv: list[str] | None = None) -> int:
    """Train; the result is OUTPUT/best.safetensors, ready for `python -m export.onnx_export`."""
    parser = argparse.ArgumentParser(
        prog="python -m training.embedded",
        description="Train the embedded blood-cell detector from nothing on the BCCD photographs.",
        epilog="example: python -m training.embedded --data data/bccd --output runs/blood-cells",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with instances_{train,val}.json and images/")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: its own choice)")
    parser.add_argument("--workers", type=int, default=1, help="processes that load and augment")
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs)
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        default=RECIPE.precision,
        help="bf16: faster by half on a processor with bfloat16 instructions, slower on one without",
    )
    parser.add_argument("--seed", type=int, default=RECIPE.seed)
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT/last.pt")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = replace(RECIPE, epochs=args.epochs, precision=args.precision, seed=args.seed)
    torch.manual_seed(args.seed)
    try:
        train, validation = read_split(args.data, "train"), read_split(args.data, "val")
        late = (max(recipe.epochs - CALM_EPOCHS, 0), CALM)
        dataset = CocoDataset(train, AUGMENT, args.seed, True, drawn_smear, DRAWN_SHARE, late)
        args.output.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(
            build_model(CONFIG), dataset, validation, recipe, args.output, Processes(torch.device("cpu")), args.workers
        )
        if args.resume:
            trainer.resume()
    except (DataError, OSError, ValueError) as error:
        parser.exit(1, f"python -m training.embedded: {error}\n")
    result = trainer.run()
    if result is not None:
        print(result.table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
