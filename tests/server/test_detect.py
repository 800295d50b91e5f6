from pathlib import Path

import pytest

from bundle import Bundle, BundleMissing, Canvas
from server.detect import detect_files, detect_picture, find_pictures, open_engine
from server.errors import BadParameter, EngineFailed, ImageError, ShapeUnsupported
from server.options import DetectOptions
from server.respond import ImageAnswer
from server.settings import Settings
from tests.server.fake_engine import MANIFEST, FakeEngine
from tests.server.pictures import BOX, HEIGHT, RED, WIDTH, encode, poison, rectangle

LIMIT = 1_000_000


def test_one_picture() -> None:
    answer = detect_picture(FakeEngine(), encode(rectangle(RED)), DetectOptions(), LIMIT)
    assert (answer.width, answer.height) == (WIDTH, HEIGHT)
    assert answer.detections[0].box_xyxy_px == pytest.approx(BOX)
    assert answer.times.decode > 0
    assert answer.times.inference > 0


def test_options_hold_as_over_http() -> None:
    assert detect_picture(FakeEngine(), encode(rectangle(RED)), DetectOptions(threshold=0.95), LIMIT).detections == []
    with pytest.raises(BadParameter, match="pink"):
        detect_picture(FakeEngine(), encode(rectangle(RED)), DetectOptions(classes="pink"), LIMIT)
    with pytest.raises(ImageError):
        detect_picture(FakeEngine(), encode(rectangle(RED)), DetectOptions(), 100)


def test_a_real_bundle(tiny_bundle: Bundle) -> None:
    engine = open_engine(Settings(bundle=tiny_bundle.path, device="cpu", engine_instances=3))
    assert len(detect_picture(engine, encode(rectangle(RED)), DetectOptions(), LIMIT).detections) == 1
    engine.close()


def test_a_missing_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleMissing, match="absent"):
        open_engine(Settings(bundle=tmp_path / "absent"))


def test_files_that_cannot_be_read_do_not_end_the_run(tmp_path: Path) -> None:
    good, bad, absent = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    good.write_bytes(encode(rectangle(RED)))
    bad.write_bytes(b"nonsense")
    outcomes = list(detect_files(FakeEngine(), [bad, absent, good], DetectOptions(), LIMIT))
    assert [each.path for each in outcomes] == [bad, absent, good]
    assert isinstance(outcomes[0].outcome, ImageError)
    assert isinstance(outcomes[1].outcome, ImageError)
    assert "No such file" in outcomes[1].outcome.message
    assert isinstance(outcomes[2].outcome, ImageAnswer)


def test_an_engine_that_fails_on_a_picture_costs_only_that(tmp_path: Path) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, data in zip(files, (poison(), encode(rectangle(RED))), strict=True):
        file.write_bytes(data)
    bad, good = detect_files(FakeEngine(), files, DetectOptions(), LIMIT)
    assert isinstance(bad.outcome, EngineFailed)
    assert "RuntimeError: poison" in bad.outcome.message
    assert isinstance(good.outcome, ImageAnswer)


def test_a_picture_that_no_canvas_holds_costs_only_itself(tmp_path: Path) -> None:
    files = [tmp_path / "tall.png", tmp_path / "wide.png"]
    for file, size in zip(files, ((20, 60), (60, 20)), strict=True):
        file.write_bytes(encode(rectangle(RED, (5, 5, 15, 15), size)))
    wide_only = MANIFEST.model_copy(update={"canvases": (Canvas(height=64, width=96),)})
    tall, wide = detect_files(FakeEngine(wide_only), files, DetectOptions(), LIMIT)
    assert isinstance(tall.outcome, ShapeUnsupported)
    assert "96x32 pixels" in tall.outcome.message
    assert isinstance(wide.outcome, ImageAnswer)


def test_folders_are_searched_for_pictures(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.JPG", "a.png", "deep/c.tiff", "notes.txt"):
        (tmp_path / name).touch()
    found = find_pictures([tmp_path, tmp_path / "notes.txt"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.png", "b.JPG", "deep/c.tiff", "notes.txt"]
