"""Evaluation: detections in the pictures' own pixels and categories, and the command line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cli.main import main
from models import DeformableDetrConfig, save_checkpoint
from tests.training.tiny import TINY, TWO_STAGE, tiny_model, write_annotations
from training.coco import CocoSplit, read_split
from training.evaluate import evaluate, predict

CPU = torch.device("cpu")


class Oracle(nn.Module):
    """Answers with the split's own boxes, picture after picture."""

    def __init__(self, split: CocoSplit, config: DeformableDetrConfig = TINY) -> None:
        super().__init__()
        self.config, self.split, self.next = config, split, 0
        self.seen: list[tuple[int, ...]] = []

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> dict[str, Tensor]:
        assert not self.training
        self.seen += [(int(mask[:, 0].sum()), int(mask[0].sum())) for mask in pixel_mask]
        n = pixel_values.shape[0]
        logits = torch.full((n, 60, self.config.num_classes), -20.0)
        boxes = torch.full((n, 60, 4), 0.5)
        for i, picture in enumerate(self.split.pictures[self.next : self.next + n]):
            scale = torch.tensor([picture.width, picture.height] * 2)
            corners = torch.tensor(picture.boxes) / scale
            for q, (box, index) in enumerate(zip(corners, picture.classes.tolist(), strict=True)):
                logits[i, q, index] = 5.0
                boxes[i, q] = torch.cat([(box[:2] + box[2:]) / 2, box[2:] - box[:2]])
        self.next += n
        return {"pred_logits": logits, "pred_boxes": boxes}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_oracle_has_ap_1(data: Path, batch_size: int) -> None:
    split = read_split(data, "train")
    model = Oracle(split)
    result = evaluate(model, split, CPU, batch_size)  # type: ignore[arg-type]
    assert result.ap == pytest.approx(1.0)
    assert result.ap50 == pytest.approx(1.0)
    present = {split.category_names[i] for picture in split.pictures for i in picture.classes}
    assert {name for name, (ap, _) in result.by_class.items() if ap > 0.99} == present
    assert model.training  # as it was before


def test_detections_are_in_pixels_of_the_picture_as_it_was(data: Path) -> None:
    split = read_split(data, "val")
    model = Oracle(split, replace(TINY, resize_shortest=40, resize_longest=1000))
    detections = predict(model, list(split.pictures), CPU)  # type: ignore[arg-type]
    assert model.seen == [(40, 60), (40, 60)]  # of 64 x 96
    assert len(detections) == 100 * len(split.pictures)
    for picture in split.pictures:
        sure = [d for d in detections if d["image_id"] == picture.image_id and d["score"] > 0.9]
        found = {(d["category_id"], *(round(v, 2) for v in d["bbox"])) for d in sure}
        wanted = {
            (split.category_ids[index], *(round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)))
            for (x0, y0, x1, y1), index in zip(picture.boxes, picture.classes, strict=True)
        }
        assert len(found) == len(wanted)
        for got, expected in zip(sorted(found), sorted(wanted), strict=True):
            assert got == pytest.approx(expected, abs=0.02)
        assert all(d["bbox"][0] >= 0 and d["bbox"][0] + d["bbox"][2] <= picture.width + 1e-3 for d in detections)


def test_without_category_ids_the_class_is_the_category(data: Path) -> None:
    split = read_split(data, "val")
    model = Oracle(split, replace(TINY, num_classes=7, category_ids=(), category_names=()))
    sure = [d["category_id"] for d in predict(model, list(split.pictures[:1]), CPU) if d["score"] > 0.9]  # type: ignore[arg-type]
    assert sorted(sure) == sorted(split.pictures[0].classes.tolist())


def test_a_model_in_training_goes_on_training(data: Path) -> None:
    model = tiny_model().train()
    predict(model, list(read_split(data, "val").pictures), CPU)
    assert model.training


def test_the_command_prints_a_table_and_writes_json(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, figures = tmp_path / "tiny.safetensors", tmp_path / "figures.json"
    save_checkpoint(tiny_model(TWO_STAGE), checkpoint)
    arguments = ["--checkpoint", str(checkpoint), "--data", str(data), "--device", "cpu", "--batch-size", "2"]

    assert main(["evaluate", *arguments, "--json", str(figures)]) == 0

    printed = capsys.readouterr()
    assert "AP50" in printed.out
    assert "Platelets" in printed.out
    assert "evaluate:   0%" in printed.err  # progress
    written = json.loads(figures.read_text())
    assert set(written["by_class"]) == {"RBC", "WBC", "Platelets"}
    assert 0 <= written["ap"] <= 1
    assert not math.isnan(written["ap50"])
    assert main(["evaluate", *arguments, "--split", "train"]) == 0


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *arguments])
    assert stopped.value.code == 1
    message = capsys.readouterr().err.rpartition("\r")[2]  # after the progress
    assert message.startswith("ddetr evaluate: ")
    assert "Traceback" not in message
    return message


def test_what_cannot_be_evaluated_is_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "two.safetensors"
    save_checkpoint(
        tiny_model(replace(TINY, num_classes=2, category_ids=(1, 9), category_names=("RBC", "other"))), checkpoint
    )
    with_data = ["--data", str(data), "--device", "cpu"]
    message = failure(["--checkpoint", str(checkpoint), *with_data], capsys)
    assert "instances_val.json has categories [2, 3], which the checkpoint does not know" in message
    assert "no checkpoint at" in failure(["--checkpoint", str(tmp_path / "none.pth"), *with_data], capsys)
    (tmp_path / "junk.pth").write_bytes(b"junk" * 10)
    assert "junk.pth: not a checkpoint" in failure(["--checkpoint", str(tmp_path / "junk.pth"), *with_data], capsys)
    assert "no annotations for 'test'" in failure(
        ["--checkpoint", str(checkpoint), *with_data, "--split", "test"], capsys
    )


def test_a_broken_picture_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    image = {"id": 3, "file_name": "broken.png", "width": 9, "height": 9}
    categories = [{"id": 1, "name": "RBC"}]
    write_annotations(tmp_path, "val", {"images": [image], "annotations": [], "categories": categories})
    checkpoint = tmp_path / "tiny.safetensors"
    save_checkpoint(tiny_model(), checkpoint)
    message = failure(["--checkpoint", str(checkpoint), "--data", str(tmp_path), "--device", "cpu"], capsys)
    assert "broken.png (image 3)" in message
