"""Reading COCO-format data: what is found, and that each fault is named with its file and id."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.training.tiny import write_annotations
from training.coco import DataError, Picture, find_split, read_pixels, read_split

Document = dict[str, Any]


def document() -> Document:
    return {
        "images": [
            {"id": 7, "file_name": "seven.png", "width": 40, "height": 30},
            {"id": 9, "file_name": "nine.png", "width": 20, "height": 50},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 2, 10, 20], "area": 200, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [30.5, 20, 20, 20], "area": 400, "iscrowd": 0},
            {"id": 3, "image_id": 7, "category_id": 3, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 1},
        ],
        "categories": [{"id": 5, "name": "zebra"}, {"id": 3, "name": "Köchin"}],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), (10, 20, 30)).save(tmp_path / "images" / "seven.png")
    Image.new("L", (20, 50), 200).save(tmp_path / "images" / "nine.png")
    write_annotations(tmp_path, "val", document())
    return tmp_path


def test_a_split_is_read(folder: Path) -> None:
    split = read_split(folder, "val")
    assert split.category_ids == (3, 5)  # classes in the order of the ids
    assert split.category_names == ("Köchin", "zebra")
    seven, nine = split.pictures
    assert (seven.image_id, seven.width, seven.height) == (7, 40, 30)
    np.testing.assert_array_equal(seven.boxes, [[1, 2, 11, 22], [30.5, 20, 40, 30]])  # clipped; the crowd left out
    assert seven.boxes.dtype == np.float32
    assert seven.classes.tolist() == [1, 0]
    assert nine.boxes.shape == (0, 4)
    assert nine.classes.dtype == np.int64
    assert read_pixels(seven)[0, 0].tolist() == [10, 20, 30]
    assert read_pixels(nine).shape == (50, 20, 3)  # grey becomes RGB


def test_annotations_need_no_area_and_no_iscrowd(folder: Path) -> None:
    bare = document()
    bare["annotations"] = [{k: v for k, v in a.items() if k not in ("area", "iscrowd")} for a in bare["annotations"]]
    write_annotations(folder, "val", bare)
    assert len(read_split(folder, "val").pictures[0].boxes) == 3


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("instances_val.json", "images"),
        ("instances_val.json", "images/val"),
        ("annotations/instances_val.json", "val"),
        ("annotations/instances_val2017.json", "val2017"),
    ],
)
def test_the_usual_layouts_are_found(tmp_path: Path, annotations: str, images: str) -> None:
    for parent in (tmp_path / annotations).parent, tmp_path / images:
        parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / annotations).write_text("{}")
    assert find_split(tmp_path, "val") == (tmp_path / annotations, tmp_path / images)


def test_coco_2017_as_it_unpacks(folder: Path) -> None:
    (folder / "images").rename(folder / "val2017")
    (folder / "train2017").mkdir()
    (folder / "annotations").mkdir()
    (folder / "instances_val.json").rename(folder / "annotations" / "instances_val2017.json")
    assert read_split(folder, "val").pictures[0].path == folder / "val2017" / "seven.png"


def test_without_annotations_the_places_looked_at_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'train'.*instances_train\.json.*instances_train2017\.json"):
        read_split(tmp_path, "train")


def test_a_box_of_no_size_is_left_out_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    # COCO's own train2017 has two of them.
    changed = document()
    changed["annotations"][1]["bbox"] = [3, 4, 5, 0.0]
    path = write_annotations(folder, "val", changed)
    with caplog.at_level(logging.WARNING):
        split = read_split(folder, "val")
    assert len(split.pictures[0].boxes) == 1
    assert f"{path}: annotation 2 has a box of no size [3, 4, 5, 0.0]" in caplog.text


def edit(where: str, index: int, **changes: Any) -> Callable[[Document], None]:
    return lambda content: content[where][index].update(changes)


def drop(where: str, index: int, key: str) -> Callable[[Document], None]:
    return lambda content: content[where][index].pop(key)


def repeat(where: str, **changes: Any) -> Callable[[Document], None]:
    return lambda content: content[where].append(content[where][0] | changes)


FAULTS: dict[str, tuple[Callable[[Document], Any], str]] = {
    "no images": (lambda d: d.pop("images"), "the list 'images' is missing"),
    "no annotations": (lambda d: d.pop("annotations"), "the list 'annotations' is missing"),
    "no categories": (lambda d: d.pop("categories"), "the list 'categories' is missing"),
    "categories no list": (lambda d: d.update(categories={}), "the list 'categories' is missing"),
    "categories empty": (lambda d: d.update(categories=[], annotations=[]), "no categories"),
    "images empty": (lambda d: d.update(images=[], annotations=[]), "no images"),
    "category twice": (repeat("categories"), "category id appears twice"),
    "image twice": (repeat("images"), "image id 7 appears twice"),
    "annotation twice": (repeat("annotations"), "annotation id 1 appears twice"),
    "annotation without id": (drop("annotations", 1, "id"), "annotation None needs 'id' as int, has None"),
    "annotation no object": (lambda d: d["annotations"].append("text"), "annotation text needs 'id' as int"),
    "category without id": (drop("categories", 0, "id"), "category None needs 'id' as int"),
    "image without name": (drop("images", 1, "file_name"), "image 9 needs 'file_name' as str, has None"),
    "image width as text": (edit("images", 1, width="20"), "image 9 needs 'width' as int, has '20'"),
    "image of no size": (edit("images", 1, height=0), r"image 9 \(nine.png\) has size 20x0"),
    "picture missing": (edit("images", 1, file_name="ten.png"), r"image 9: \S+ten.png does not exist"),
    "unknown image": (edit("annotations", 1, image_id=8), "annotation 2 belongs to image 8, which is not listed"),
    "unknown category": (edit("annotations", 1, category_id=4), "annotation 2 has category 4, which is not listed"),
    "bbox missing": (drop("annotations", 1, "bbox"), r"annotation 2 \(seven.png\) needs bbox .* has None"),
    "bbox too short": (edit("annotations", 1, bbox=[1, 2, 3]), r"annotation 2 .* has \[1, 2, 3\]"),
    "bbox as text": (edit("annotations", 1, bbox=["1", 2, 3, 4]), "annotation 2 .* has"),
    "bbox NaN": (edit("annotations", 1, bbox=[1, 2, float("nan"), 4]), "annotation 2 .* nan"),
    "bbox infinite": (edit("annotations", 1, bbox=[1, 2, float("inf"), 4]), "annotation 2 .* inf"),
    "bbox huge": (edit("annotations", 1, bbox=[1, 2, 10**400, 4]), "annotation 2 .* 1000"),
    "bbox negative": (edit("annotations", 1, bbox=[9, 9, -3, 4]), r"annotation 2 .*negative size: \[9, 9, -3, 4\]"),
    "bbox outside": (edit("annotations", 1, bbox=[50, 2, 3, 4]), r"annotation 2 .*outside the picture of 40x30"),
    "crowd's bbox": (edit("annotations", 2, bbox=None), "annotation 3 .* has None"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_file_and_id(folder: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    content = document()
    change(content)
    path = write_annotations(folder, "val", content)
    with pytest.raises(DataError, match=message) as caught:
        read_split(folder, "val")
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe", b'{"images": [}'])
def test_what_is_not_json_is_named(folder: Path, content: bytes) -> None:
    path = folder / "instances_val.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not JSON|is missing") as caught:
        read_split(folder, "val")
    assert str(path) in str(caught.value)


def picture(path: Path) -> Picture:
    return Picture(7, path, 40, 30, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))


def test_a_picture_of_another_size_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"seven\.png \(image 7\) is 40x30, annotated as 30x40"):
        read_pixels(replace(picture(folder / "images" / "seven.png"), width=30, height=40))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_truncated_picture_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    assert read_pixels(picture(path)).shape == (30, 40, 3)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=rf"cut\.{suffix} \(image 7\)"):
        read_pixels(picture(path))


@pytest.mark.filterwarnings("ignore")  # Pillow's, about odd metadata
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
def test_a_damaged_picture_is_read_or_named_never_a_crash(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"damaged.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole, drawn = path.read_bytes(), random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[drawn.randrange(min(len(damaged), 120))] = drawn.randrange(256)
        path.write_bytes(damaged)
        try:
            read_pixels(picture(path))
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017 - either outcome is right


def test_json_of_the_document_is_the_samples_own_format(data: Path) -> None:
    train, val = read_split(data, "train"), read_split(data, "val")
    assert (len(train.pictures), len(val.pictures)) == (4, 2)
    assert train.category_names == val.category_names == ("RBC", "WBC", "Platelets")
    listed = json.loads((data / "instances_train.json").read_text())["annotations"]
    assert sum(len(picture.boxes) for picture in train.pictures) == len(listed) > 0
