"""AP of a bundle measured through POST /detect, beside AP of its checkpoint in PyTorch.

python -m benchmarks.http_ap --bundle models/blood-cells --data DIR
"""

import argparse
import json
import urllib.request
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.machine import machine
from loadtest.server_process import serving
from models import load_checkpoint
from training.average_precision import AveragePrecision, Detection, average_precision
from training.coco import CocoSplit, read_split
from training.evaluate import evaluate

TOLERANCE = 0.002


def detections_over_http(url: str, split: CocoSplit) -> list[Detection]:
    """Post every picture as it lies on disk; collect COCO detections (threshold 0, the best 100)."""
    found: list[Detection] = []
    query = "threshold=0&max_detections=100&box_format=xywh"
    for picture in tqdm(split.pictures, desc="POST /detect"):
        request = urllib.request.Request(
            f"{url}/detect?{query}", picture.path.read_bytes(), {"Content-Type": "image/jpeg"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.loads(response.read())
        found += [
            {
                "image_id": picture.image_id,
                "category_id": detection["class_id"],
                "bbox": detection["box"],
                "score": detection["score"],
            }
            for detection in answer["images"][0]["detections"]
        ]
    return found


def main() -> int:
    """Print both tables; exit 1 when the two APs differ by more than 0.002."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="with its checkpoint, model.safetensors, inside")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    args = parser.parse_args()
    split = read_split(args.data, args.split)
    with serving(["--bundle", str(args.bundle)]) as server:
        served = average_precision(split.annotations, detections_over_http(server.url, split))
    model = load_checkpoint(args.bundle / "model.safetensors")
    trained: AveragePrecision = evaluate(model, split, torch.device("cpu"), progress=True)
    print(machine())
    print(f"\nPyTorch, {len(split.pictures)} pictures of {args.split}\n{trained.table()}")
    print(f"\nPOST /detect\n{served.table()}")
    difference = max(abs(served.ap - trained.ap), abs(served.ap50 - trained.ap50))
    print(f"\nlargest difference of AP and AP50: {difference:.5f} (at most {TOLERANCE})")
    return int(difference > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
