"""Train or fine-tune: `python -m training.train --data DIR --output DIR`; several processes through torchrun."""

import argparse
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist
from torch import nn

from bundle import ResizeRule
from models import VARIANTS, DeformableDetr, build_model, load_checkpoint
from training.augment import PaperAugment
from training.coco import CocoSplit, DataError, read_split
from training.dataset import CocoDataset
from training.recipe import Recipe
from training.trainer import Processes, Trainer, read_state

EXAMPLE = """examples:
  ddetr train --data data/coco --output runs/coco --variant r50-two-stage --backbone-weights resnet50.pth
  ddetr train --data data/cells --output runs/cells --checkpoint r50_deformable_detr.pth --epochs 20
  torchrun --nproc-per-node 8 -m training.train --data data/coco --output runs/coco --batch-size 4
"""


def start_model(args: argparse.Namespace, data: CocoSplit) -> DeformableDetr:
    """The network to train: a checkpoint's or a variant's, with the data's classes."""
    if args.checkpoint is None:
        config = replace(
            VARIANTS[args.variant or "r50"],
            num_classes=len(data.category_ids),
            category_ids=data.category_ids,
            category_names=data.category_names,
        )
        if args.freeze_stem and args.backbone_weights is None:
            raise ValueError(
                "training from nothing would freeze a random first stage: give --checkpoint or --backbone-weights, "
                "or train all of it with --no-freeze-stem"
            )
        model = build_model(config)
    else:
        model = with_categories(load_checkpoint(args.checkpoint, args.variant), data)
    if args.backbone_weights is not None:
        load_backbone(model, args.backbone_weights)
    sizes = {"resize_shortest": args.shortest, "resize_longest": args.longest}
    model.config = replace(model.config, **{key: value for key, value in sizes.items() if value})
    return model


def with_categories(model: DeformableDetr, data: CocoSplit) -> DeformableDetr:
    """The same network for the data's label set: all weights kept but, where the set differs, the class heads'."""
    config = model.config
    if (config.category_ids, config.category_names) == (data.category_ids, data.category_names):
        return model
    renamed = replace(
        config,
        num_classes=len(data.category_ids),
        category_ids=data.category_ids,
        category_names=data.category_names,
    )
    fresh = build_model(renamed)
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith("class_embed.")}
    heads = {name: value for name, value in fresh.state_dict().items() if name.startswith("class_embed.")}
    fresh.load_state_dict(kept | heads)
    return fresh


def load_backbone(model: DeformableDetr, path: Path) -> None:
    """ImageNet weights under torchvision's names (the classifier `fc` is left out); a wrong key is a ValueError."""
    state = {name: value for name, value in read_state(path).items() if not name.startswith("fc.")}
    mine = model.backbone.state_dict()
    if wrong := [name for name in mine.keys() & state.keys() if mine[name].shape != state[name].shape]:
        shapes = f"{list(state[wrong[0]].shape)}, not {list(mine[wrong[0]].shape)}"
        raise ValueError(f"{path}: not this backbone: {wrong[0]} is {shapes}")
    if isinstance(model.backbone.bn1, nn.BatchNorm2d):
        missing, surplus = model.backbone.load_state_dict(state, strict=False)
    else:
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        missing, surplus = model.backbone.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or surplus:
        raise ValueError(f"{path}: not this backbone: missing {missing[:3]}, surplus {surplus[:3]}")


def join_processes(device: str) -> Processes:
    """This process among torchrun's, or alone; `device` is cpu, cuda or cuda:N."""
    if "RANK" not in os.environ:
        return Processes(torch.device(device))
    rank, world_size, local = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    mine = torch.device("cuda", local) if device.startswith("cuda") else torch.device(device)
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
    dist.init_process_group("nccl" if mine.type == "cuda" else "gloo")
    return Processes(mine, rank, world_size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ddetr train",
        description="Train a Deformable DETR on COCO-format data. Options of the recipe default to the paper's.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with instances_{train,val}.json and images/")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and log.csv")
    parser.add_argument("--variant", choices=sorted(VARIANTS), help="default r50; with --checkpoint: what it is")
    parser.add_argument("--checkpoint", type=Path, help="fine-tune from any loadable checkpoint")
    parser.add_argument("--backbone-weights", type=Path, help="ImageNet weights of the backbone (torchvision's keys)")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT/last.pt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes that load and augment (default 2)")
    parser.add_argument("--shortest", type=int, help="shortest side of the resize rule, px (default: the network's)")
    parser.add_argument("--longest", type=int, help="longest side of the resize rule, px (default: the network's)")
    recipe = parser.add_argument_group("recipe")
    for field in fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            recipe.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            choices = get_args(field.type) or None
            kind = str if choices else field.type
            recipe.add_argument(
                flag, type=kind, choices=choices, default=field.default, help=f"(default {field.default})"
            )
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line of `ddetr train`."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
        if recipe.precision != "fp32" and not args.device.startswith("cuda"):
            raise ValueError(f"precision {recipe.precision} needs a GPU, device is {args.device}")
        train, validation = read_split(args.data, "train"), read_split(args.data, "val")
        if validation.category_ids != train.category_ids:
            raise DataError(f"{validation.annotations} lists other categories than {train.annotations}")
        torch.manual_seed(recipe.seed)
        model = start_model(args, train)
        processes = join_processes(args.device)
        rule = ResizeRule(shortest=model.config.resize_shortest, longest=model.config.resize_longest)
        dataset = CocoDataset(train, PaperAugment(rule), recipe.seed)
        args.output.mkdir(parents=True, exist_ok=True)
        if not args.resume and (args.output / "last.pt").exists():
            raise ValueError(f"{args.output} holds a run already: add --resume, or choose another folder")
        trainer = Trainer(model, dataset, validation, recipe, args.output, processes, args.workers)
        if args.resume:
            trainer.resume()
    except (DataError, OSError, ValueError) as error:
        parser.exit(1, f"ddetr train: {error}\n")
    try:
        result = trainer.run()
    except (DataError, FloatingPointError) as error:
        reason = str(error).strip().rpartition("DataError: ")[2]  # without the traceback of the process that loads
        parser.exit(1, f"ddetr train: {reason}\n")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if result is not None and processes.rank == 0:
        print(result.table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
