"""AP of a checkpoint on a split: `python -m training.evaluate --checkpoint FILE --data DIR`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from bundle import ResizeRule
from models import DeformableDetr, load_checkpoint
from models.postprocess import top_detections
from training.augment import Sample, resize
from training.average_precision import AveragePrecision, Detection, average_precision
from training.coco import CocoSplit, DataError, Picture, read_pixels, read_split
from training.dataset import collate

MAX_DETECTIONS = 100


@torch.no_grad()
def predict(
    model: DeformableDetr, pictures: list[Picture], device: torch.device, batch_size: int = 1, progress: bool = False
) -> list[Detection]:
    """Detections of pictures at the model's own resolution, as a server would see them (COCO's result format)."""
    config = model.config
    rule = ResizeRule(shortest=config.resize_shortest, longest=config.resize_longest)
    training = model.training
    model.eval()
    detections: list[Detection] = []
    starts = range(0, len(pictures), batch_size)
    for start in tqdm(starts, desc="evaluate", disable=not progress, leave=False):
        chunk = pictures[start : start + batch_size]
        batch = collate([resize(Sample(read_pixels(p), p.boxes, p.classes), rule) for p in chunk], config)
        outputs = model(batch.pixel_values.to(device), batch.pixel_mask.to(device))
        found = top_detections(outputs["pred_logits"], outputs["pred_boxes"], MAX_DETECTIONS)
        for picture, boxes, scores, classes in zip(chunk, *(t.cpu() for t in found), strict=True):
            scale = torch.tensor([picture.width, picture.height, picture.width, picture.height])
            corners = (boxes * scale).clamp(min=0).minimum(scale)
            corners[:, 2:] -= corners[:, :2]
            for box, score, index in zip(corners.tolist(), scores.tolist(), classes.tolist(), strict=True):
                category = config.category_ids[index] if config.category_ids else index
                detections.append({"image_id": picture.image_id, "category_id": category, "bbox": box, "score": score})
    model.train(training)
    return detections


def evaluate(
    model: DeformableDetr, split: CocoSplit, device: torch.device, batch_size: int = 1, progress: bool = False
) -> AveragePrecision:
    """AP of a model on a split; in a process group each process answers for its share of the pictures."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    detections = predict(model, list(split.pictures[rank::world_size]), device, batch_size, progress)
    if world_size > 1:
        gathered: list[list[Detection]] = [[] for _ in range(world_size)]
        dist.all_gather_object(gathered, detections)
        detections = [detection for share in gathered for detection in share]
    return average_precision(split.annotations, detections)


def main(argv: list[str] | None = None) -> int:
    """The command line of `ddetr evaluate`."""
    parser = argparse.ArgumentParser(
        prog="ddetr evaluate",
        description="Average precision of a checkpoint on COCO-format data.",
        epilog="example: ddetr evaluate --checkpoint runs/cells/best.safetensors --data data/cells --split val",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="any loadable checkpoint")
    parser.add_argument("--variant", help="the variant's name, where the checkpoint cannot tell (dilation)")
    parser.add_argument("--data", type=Path, required=True, help="folder with instances_val.json and images/")
    parser.add_argument("--split", default="val", help="train or val (default val)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    try:
        split = read_split(args.data, args.split)
        model = load_checkpoint(args.checkpoint, args.variant).to(args.device)
        ids = model.config.category_ids or range(model.config.num_classes)
        if missing := sorted(set(split.category_ids) - set(ids)):
            raise DataError(f"{split.annotations} has categories {missing}, which the checkpoint does not know")
    except (DataError, OSError, ValueError) as error:
        parser.exit(1, f"ddetr evaluate: {error}\n")
    try:
        result = evaluate(model, split, torch.device(args.device), args.batch_size, progress=True)
    except DataError as error:
        parser.exit(1, f"ddetr evaluate: {error}\n")
    print(result.table())
    if args.json:
        args.json.write_text(json.dumps(asdict(result), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
