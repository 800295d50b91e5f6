import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samples import CATEGORIES, draw_smear
from samples.__main__ import main
from samples.coco import write_smears


def test_written_smears_read_back(tmp_path: Path) -> None:
    path = write_smears(tmp_path / "new" / "smears", count=3, seed=7, height=120, width=160)
    data = json.loads(path.read_text())
    assert {category["id"]: category["name"] for category in data["categories"]} == CATEGORIES
    assert [image["id"] for image in data["images"]] == [1, 2, 3]
    assert len({annotation["id"] for annotation in data["annotations"]}) == len(data["annotations"])
    for index, image in enumerate(data["images"]):
        smear = draw_smear(7 + index, 120, 160)
        assert (image["height"], image["width"]) == (120, 160)
        with Image.open(path.parent / "images" / image["file_name"]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), smear.image)
        mine = [annotation for annotation in data["annotations"] if annotation["image_id"] == image["id"]]
        xywh = np.array([annotation["bbox"] for annotation in mine]).reshape(-1, 4)
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        np.testing.assert_allclose(xyxy, smear.boxes, atol=0.02)  # written with two decimals
        assert [annotation["category_id"] for annotation in mine] == smear.category_ids.tolist()
        for annotation in mine:
            assert annotation["iscrowd"] == 0
            assert annotation["area"] == pytest.approx(annotation["bbox"][2] * annotation["bbox"][3], rel=0.01)


def test_pycocotools_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    path = write_smears(tmp_path, count=2, height=96, width=128)
    data = coco.COCO(str(path))
    assert data.getCatIds() == sorted(CATEGORIES)
    assert len(data.getImgIds()) == 2
    capsys.readouterr()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--count", "2", "--output", str(tmp_path), "--height", "64", "--width", "96"]
    assert main(arguments) == 0
    assert "2 smears" in capsys.readouterr().out
    assert len(list((tmp_path / "images").glob("*.png"))) == 2


def test_command_line_names_a_bad_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--count", "0", "--output", str(tmp_path)])
    assert "got 0" in capsys.readouterr().err


def test_no_smears_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got -3"):
        write_smears(tmp_path, count=-3)
