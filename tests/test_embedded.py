"""The embedded model, end to end: drawn smears in over HTTP, correct boxes out, whoever shares the batch."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from bundle import embedded_bundle, read_bundle
from models import load_checkpoint
from samples import draw_smear
from samples.coco import write_smears
from server.app import create_app
from server.settings import Settings
from training.average_precision import Detection, average_precision
from training.coco import CocoSplit, read_split
from training.evaluate import evaluate

SEED, COUNT = 900_000_000, 12  # of drawn smears; training draws its seeds from below 2**31 at random
MIN_AP50 = 0.80  # on drawn smears
MAX_FILE_BYTES = 16 * 2**20
AP_TOLERANCE = 0.002  # PyTorch against HTTP
SCORE_TOLERANCE, BOX_TOLERANCE_PX = 1e-4, 0.1  # alone against in a batch


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    # A long delay and one engine: pictures that arrive together are batched as soon as the engine is busy.
    with TestClient(create_app(Settings(max_batch_size=8))) as client:
        yield client


@pytest.fixture(scope="module")
def smears(tmp_path_factory: pytest.TempPathFactory) -> CocoSplit:
    folder = tmp_path_factory.mktemp("smears")
    write_smears(folder, COUNT, seed=SEED)
    (folder / "instances.json").rename(folder / "instances_val.json")
    return read_split(folder, "val")


def detect(client: TestClient, data: bytes, query: str = "threshold=0&box_format=xywh") -> list[dict[str, Any]]:
    response = client.post(f"/detect?{query}", content=data, headers={"Content-Type": "image/*"})
    assert response.status_code == 200, response.text
    detections: list[dict[str, Any]] = response.json()["images"][0]["detections"]
    return detections


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_bundle_is_whole_and_small() -> None:
    bundle = read_bundle(embedded_bundle())
    for name in ("model.onnx", "model.safetensors"):
        assert (bundle.path / name).stat().st_size < MAX_FILE_BYTES
    assert set(bundle.manifest.categories.values()) == {"RBC", "WBC", "Platelets"}
    assert (bundle.path / "README.md").is_file()
    assert bundle.manifest.parity
    json.loads((bundle.path / "manifest.json").read_text())


def test_drawn_smears_are_detected_over_http_as_in_pytorch(client: TestClient, smears: CocoSplit) -> None:
    found: list[Detection] = [
        {"image_id": p.image_id, "category_id": d["class_id"], "bbox": d["box"], "score": d["score"]}
        for p in smears.pictures
        for d in detect(client, p.path.read_bytes())
    ]
    served = average_precision(smears.annotations, found)
    assert served.ap50 > MIN_AP50
    model = load_checkpoint(embedded_bundle() / "model.safetensors")
    trained = evaluate(model, smears, torch.device("cpu"))
    assert served.ap == pytest.approx(trained.ap, abs=AP_TOLERANCE)
    assert served.ap50 == pytest.approx(trained.ap50, abs=AP_TOLERANCE)


def test_an_answer_does_not_depend_on_its_neighbours(client: TestClient) -> None:
    sizes = [(480, 640), (240, 320), (640, 480), (300, 400), (480, 600), (200, 640), (400, 400), (450, 640)]
    pictures = [png(draw_smear(SEED + i, height, width).image) for i, (height, width) in enumerate(sizes)]
    query = "threshold=0.05&box_format=xyxy"
    alone = [detect(client, picture, query) for picture in pictures]
    batches_before = _batches(client)
    files = [("images", (f"{i}.png", picture, "image/png")) for i, picture in enumerate(pictures)]
    response = client.post(f"/detect?{query}", files=files)
    assert response.status_code == 200
    assert _batches(client) - batches_before < len(pictures), "some pictures must have shared a batch"
    for one, among in zip(alone, response.json()["images"], strict=True):
        assert len(one) > 0
        _assert_same(one, among["detections"])


def _assert_same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    """The same detections; those whose scores differ by rounding only may have swapped places."""
    assert len(first) == len(second)
    left = list(second)
    for detection in first:
        for candidate in left:
            if (
                candidate["class_id"] == detection["class_id"]
                and abs(candidate["score"] - detection["score"]) <= SCORE_TOLERANCE
                and np.abs(np.subtract(candidate["box"], detection["box"])).max() <= BOX_TOLERANCE_PX
            ):
                left.remove(candidate)
                break
        else:
            pytest.fail(f"{detection} has no equal beside its neighbours")


def _batches(client: TestClient) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("ddetr_batches_total{"))


@pytest.mark.parametrize("kind", ["grey", "palette", "cmyk", "turned"])
def test_unusual_pictures_give_the_boxes_a_person_expects(client: TestClient, kind: str, tmp_path: Path) -> None:
    smear = draw_smear(SEED)
    picture = Image.fromarray(smear.image)
    exif = Image.Exif()
    if kind == "grey":
        picture = picture.convert("L")
    elif kind == "palette":
        picture = picture.quantize(256)
    elif kind == "cmyk":
        picture = picture.convert("CMYK")
    else:
        picture = picture.transpose(Image.Transpose.ROTATE_90)
        exif[0x0112] = 6  # shown after a turn by 90 degrees clockwise
    path = tmp_path / ("smear.png" if kind == "palette" else "smear.jpg")
    picture.save(path, quality=95, exif=exif) if path.suffix == ".jpg" else picture.save(path)
    found = detect(client, path.read_bytes(), "threshold=0.3&box_format=xyxy")
    white = [i for i, category in enumerate(smear.category_ids) if category == 2]
    wanted = smear.boxes[white] if white and kind != "grey" else smear.boxes
    boxes = np.array([d["box"] for d in found if kind == "grey" or d["class_id"] == 2 or not white])
    assert len(boxes)
    best = [_iou(box, boxes).max() for box in wanted]
    assert np.median(best) > 0.7


def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    shared = (high - low).clip(0).prod(1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod() - shared
    overlap: np.ndarray = shared / area
    return overlap
