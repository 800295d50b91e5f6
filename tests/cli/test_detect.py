from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from bundle import BundleMissing
from cli.main import main
from server.app import create_app
from server.settings import Settings
from tests.server.fake_engine import FakeEngine
from tests.server.pictures import BLACK, BOX, GREEN, HEIGHT, RED, WIDTH, rectangle


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr("cli.detect.open_engine", lambda settings: fake)
    return fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, one of them in a folder below, a broken file and a text."""
    (tmp_path / "below").mkdir()
    rectangle(RED).save(tmp_path / "a.png")
    rectangle(GREEN).save(tmp_path / "below" / "a.bmp")
    (tmp_path / "c.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("not asked for")
    return tmp_path


def test_json_has_the_form_of_the_service_s_answer(
    folder: Path, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "a.png"
    assert main(["detect", str(path)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["model"] == {"name": "bright", "version": "7"}
    assert answer["images"] == [
        {
            "file": str(path),
            "width": WIDTH,
            "height": HEIGHT,
            "detections": [{"label": "red", "class_id": 1, "score": 0.9, "box": list(BOX)}],
        }
    ]
    assert engine.closed


def test_a_folder_stands_for_its_pictures_and_an_unreadable_one_costs_only_itself(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["detect", str(folder)]) == 1
    output = capsys.readouterr()
    images = json.loads(output.out)["images"]
    assert [image["file"] for image in images] == [str(folder / name) for name in ("a.png", "below/a.bmp", "c.jpg")]
    assert [len(image["detections"]) for image in images[:2]] == [1, 1]
    assert set(images[2]) == {"file", "error"}
    assert images[2]["error"]["code"]
    assert "1 of 3 files have no answer" in output.err


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detect", str(tmp_path / "gone.png"), "--format", "jsonl"]) == 1
    image = json.loads(capsys.readouterr().out)
    assert image["file"].endswith("gone.png")
    assert "No such file" in image["error"]["message"]


def test_a_quoted_pattern_is_resolved(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detect", str(folder / "**" / "a.*"), "--format", "jsonl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["file"] for line in lines] == [str(folder / "a.png"), str(folder / "below" / "a.bmp")]


def test_coco_carries_file_names_and_scores(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detect", str(folder / "a.png"), "--format", "coco"]) == 0
    dataset = json.loads(capsys.readouterr().out)
    assert dataset["images"][0]["file_name"] == str(folder / "a.png")
    assert dataset["annotations"][0]["score"] == 0.9
    assert dataset["annotations"][0]["bbox"] == [BOX[0], BOX[1], BOX[2] - BOX[0], BOX[3] - BOX[1]]


def test_options_are_those_of_the_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rectangle((255, 255, 0)).save(tmp_path / "a.png")  # red with 0.9, green with 0.6
    path = str(tmp_path / "a.png")

    def labels(*flags: str) -> list[str]:
        assert main(["detect", path, "--format", "jsonl", *flags]) == 0
        return [found["label"] for found in json.loads(capsys.readouterr().out)["detections"]]

    assert labels() == ["red", "green"]
    assert labels("--threshold", "0.7") == ["red"]
    assert labels("--max-detections", "1") == ["red"]
    assert labels("--classes", "green") == ["green"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--threshold", "2"], "threshold: '2'"),
        (["--classes", "purple"], "'purple' is none of red (1)"),
        (["--format", "coco", "--box-format", "xyxy"], "box_format"),
        (["--draw", "out", "--format", "jsonl"], "not allowed with"),
    ],
)
def test_what_is_refused_is_named(
    folder: Path, flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["detect", str(folder / "a.png"), *flags])
    assert left.value.code == 2
    assert named in capsys.readouterr().err


def test_a_folder_without_pictures_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["detect", str(tmp_path)])
    assert f"no pictures in {tmp_path}" in capsys.readouterr().err


def test_draw_writes_pictures_and_no_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = folder / "drawn" / "here"
    assert main(["detect", str(folder), "--draw", str(drawn)]) == 1
    output = capsys.readouterr()
    assert sorted(path.name for path in drawn.iterdir()) == ["a-2.png", "a.png"]
    assert f"{folder / 'a.png'} -> {drawn / 'a.png'}: 1 detections" in output.out
    assert f"{folder / 'c.jpg'}: " in output.err
    with Image.open(drawn / "a.png") as picture:
        assert picture.size == (WIDTH, HEIGHT)
        assert picture.getpixel((BOX[0], BOX[3] - 1)) not in (RED, BLACK), "the box's corner is drawn"


def test_draw_writes_the_very_file_that_the_service_answers(folder: Path, engine: FakeEngine) -> None:
    upright = folder / "phone.jpg"
    picture = rectangle((255, 255, 0))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(upright, exif=exif, quality=95)
    assert main(["detect", str(upright), "--draw", str(folder / "drawn"), "--threshold", "0.1"]) == 0
    with TestClient(create_app(Settings(bundle=folder), FakeEngine())) as client:
        headers = {"Content-Type": "image/jpeg"}
        served = client.post("/detect?format=image&threshold=0.1", content=upright.read_bytes(), headers=headers)
    assert served.content == (folder / "drawn" / "phone.png").read_bytes()


def test_draw_never_overwrites_an_input(folder: Path) -> None:
    before = (folder / "a.png").read_bytes()
    assert main(["detect", str(folder / "a.png"), "--draw", str(folder)]) == 0
    assert (folder / "a.png").read_bytes() == before
    assert (folder / "a-2.png").is_file()


def test_the_bundle_named_is_the_one_opened(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def open_missing(settings: Settings) -> FakeEngine:
        raise BundleMissing(f"{settings.bundle}: no such folder")

    monkeypatch.setattr("cli.detect.open_engine", open_missing)
    assert main(["detect", str(folder / "a.png"), "--bundle", str(folder / "nowhere")]) == 1
    assert capsys.readouterr().err == f"ddetr detect: {folder / 'nowhere'}: no such folder\n"


def test_a_folder_that_cannot_be_written_to_is_told_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "smear.png"
    picture.write_bytes(b"")
    assert main(["detect", str(picture), "--draw", str(picture), "--bundle", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"ddetr detect: --draw: cannot write to {picture}: ")
    assert told.count("\n") == 1
