"""Writes drawn smears as a detection data set: pictures and one annotation file in COCO's format."""

import json
from pathlib import Path

from PIL import Image

from samples.smears import CATEGORIES, draw_smear

ANNOTATIONS_NAME = "instances.json"


def write_smears(output: Path, count: int, seed: int = 0, height: int = 480, width: int = 640) -> Path:
    """Write `count` PNG smears to output/images and return the path of output/instances.json.

    Smear i is `draw_smear(seed + i, height, width)`. Raises ValueError for a count below 1 and what draw_smear raises.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    folder = output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for image_id in range(1, count + 1):
        smear = draw_smear(seed + image_id - 1, height, width)
        name = f"smear_{seed + image_id - 1:06d}.png"
        Image.fromarray(smear.image).save(folder / name)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for box, category_id in zip(smear.boxes.tolist(), smear.category_ids.tolist(), strict=True):
            x0, y0, x1, y1 = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [round(edge, 2) for edge in (x0, y0, x1 - x0, y1 - y0)],
                    "area": round((x1 - x0) * (y1 - y0), 2),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": category_id, "name": name} for category_id, name in CATEGORIES.items()]
    path = output / ANNOTATIONS_NAME
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path
