"""COCO-format data: reading it with every fault named, and finding a split's files in a folder."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LOG = logging.getLogger(__name__)
FARTHEST_PX = 1e6  # no picture reaches as far, so no box does


class DataError(ValueError):
    """The annotations or a picture cannot be used; the message names the file and the id."""


@dataclass(frozen=True)
class Picture:
    """One annotated picture: boxes float32 [n, 4] x0, y0, x1, y1 in pixels, classes int64 [n].

    Crowds and boxes of no size are left out.
    """

    image_id: int
    path: Path
    width: int
    height: int
    boxes: np.ndarray
    classes: np.ndarray


@dataclass(frozen=True)
class CocoSplit:
    """A split in memory; class i is category `category_ids[i]`, named `category_names[i]`."""

    annotations: Path
    pictures: tuple[Picture, ...]
    category_ids: tuple[int, ...]
    category_names: tuple[str, ...]


def find_split(data: Path, split: str) -> tuple[Path, Path]:
    """The annotation file and the picture folder of `split` ("train" or "val") under `data`.

    Understands `instances_train.json` + `images/`, and COCO's `annotations/instances_train2017.json` + `train2017/`.
    """
    tried = []
    for annotations in (
        data / f"instances_{split}.json",
        data / "annotations" / f"instances_{split}.json",
        data / "annotations" / f"instances_{split}2017.json",
    ):
        tried.append(annotations)
        if annotations.is_file():
            for images in (data / f"{split}2017", data / "images" / split, data / split, data / "images", data):
                if images.is_dir():
                    return annotations, images
    raise DataError(f"no annotations for {split!r} in {data}: looked for {', '.join(map(str, tried))}")


def read_split(data: Path, split: str) -> CocoSplit:
    """Read and check the annotations of a split; raises DataError naming the file and the id of what is wrong."""
    annotations, images = find_split(data, split)
    try:
        document = json.loads(annotations.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{annotations}: not JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise DataError(f"{annotations}: the list {key!r} is missing")
    categories = sorted(
        (_field(annotations, "category", c, "id", int), str(c.get("name", c["id"]))) for c in document["categories"]
    )
    if not categories:
        raise DataError(f"{annotations}: no categories")
    class_of = {category_id: index for index, (category_id, _) in enumerate(categories)}
    if len(class_of) != len(categories):
        raise DataError(f"{annotations}: a category id appears twice")

    sizes: dict[int, tuple[Path, int, int]] = {}
    for image in document["images"]:
        image_id = _field(annotations, "image", image, "id", int)
        if image_id in sizes:
            raise DataError(f"{annotations}: image id {image_id} appears twice")
        path = images / _field(annotations, "image", image, "file_name", str)
        width, height = (_field(annotations, "image", image, key, int) for key in ("width", "height"))
        if width < 1 or height < 1:
            raise DataError(f"{annotations}: image {image_id} ({path.name}) has size {width}x{height}")
        if not path.is_file():
            raise DataError(f"{annotations}: image {image_id}: {path} does not exist")
        sizes[image_id] = (path, width, height)

    found: dict[int, list[tuple[list[float], int]]] = {image_id: [] for image_id in sizes}
    numbers: set[int] = set()
    for annotation in document["annotations"]:
        number = _field(annotations, "annotation", annotation, "id", int)
        where = f"{annotations}: annotation {number}"
        if number in numbers:
            raise DataError(f"{annotations}: annotation id {number} appears twice")
        numbers.add(number)
        image_id = _field(annotations, "annotation", annotation, "image_id", int)
        category = _field(annotations, "annotation", annotation, "category_id", int)
        if image_id not in sizes:
            raise DataError(f"{where} belongs to image {image_id}, which is not listed")
        if category not in class_of:
            raise DataError(f"{where} has category {category}, which is not listed")
        corners = _corners(where, annotation.get("bbox"), sizes[image_id])
        if corners is None:
            LOG.warning("%s has a box of no size %s, left out", where, annotation["bbox"])
        elif not annotation.get("iscrowd"):
            found[image_id].append((corners, class_of[category]))

    pictures = tuple(
        Picture(
            image_id,
            path,
            width,
            height,
            np.array([box for box, _ in found[image_id]], dtype=np.float32).reshape(-1, 4),
            np.array([index for _, index in found[image_id]], dtype=np.int64),
        )
        for image_id, (path, width, height) in sizes.items()
    )
    if not pictures:
        raise DataError(f"{annotations}: no images")
    return CocoSplit(annotations, pictures, tuple(i for i, _ in categories), tuple(name for _, name in categories))


def read_pixels(picture: Picture) -> np.ndarray:
    """The picture as uint8 [height, width, 3] RGB; raises DataError when it cannot be read or has another size."""
    try:
        with Image.open(picture.path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{picture.path} (image {picture.image_id}): {error}") from error
    if pixels.shape[:2] != (picture.height, picture.width):
        found = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise DataError(
            f"{picture.path} (image {picture.image_id}) is {found}, annotated as {picture.width}x{picture.height}"
        )
    return pixels


def _field(file: Path, kind: str, entry: Any, key: str, wanted: type) -> Any:
    """entry[key], which must be of type `wanted`."""
    if not isinstance(entry, dict) or not isinstance(entry.get(key), wanted):
        number = entry.get("id") if isinstance(entry, dict) else entry
        value = entry.get(key) if isinstance(entry, dict) else None
        raise DataError(f"{file}: {kind} {number} needs {key!r} as {wanted.__name__}, has {value!r}")
    return entry[key]


def _corners(where: str, bbox: Any, size: tuple[Path, int, int]) -> list[float] | None:
    """COCO's x, y, w, h as x0, y0, x1, y1 clipped to the picture; None where w or h is 0, as COCO itself has some."""
    path, width, height = size
    numbers = bbox if isinstance(bbox, list) and len(bbox) == 4 else None
    if numbers is None or not all(isinstance(v, int | float) and abs(v) < FARTHEST_PX for v in numbers):
        raise DataError(f"{where} ({path.name}) needs bbox [x, y, width, height], has {bbox!r}")
    x, y, w, h = map(float, numbers)
    if w < 0 or h < 0:
        raise DataError(f"{where} ({path.name}) has a bbox of negative size: {bbox!r} is to be [x, y, width, height]")
    if w == 0 or h == 0:
        return None
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if x1 <= x0 or y1 <= y0:
        raise DataError(f"{where} ({path.name}) has its box {bbox!r} outside the picture of {width}x{height}")
    return [x0, y0, x1, y1]
