import orjson
import pytest

from server.errors import (
    BadParameter,
    DeadlinePassed,
    EngineFailed,
    FormatUnsupported,
    ImageEmpty,
    ImageTooLarge,
    NothingReadable,
    ServiceError,
)
from server.options import BoxFormat, DetectOptions, Units
from server.postprocess import Detection
from server.respond import ImageAnswer, check_outcomes, coco_body, convert_box, json_body
from server.timing import StageTimes, server_timing, slowest
from tests.server.fake_engine import MANIFEST

ANSWER = ImageAnswer(200, 100, [Detection("red", 1, 0.87654321, (20.0, 10.0, 60.12345, 50.0))], StageTimes())
EMPTY = ImageEmpty("no bytes")


@pytest.mark.parametrize(
    ("box_format", "units", "expected"),
    [
        ("xyxy", "pixel", [20, 10, 60.123, 50]),
        ("xywh", "pixel", [20, 10, 40.123, 40]),
        ("cxcywh", "pixel", [40.062, 30, 40.123, 40]),
        ("xyxy", "normalized", [0.1, 0.1, 0.300617, 0.5]),
        ("xywh", "normalized", [0.1, 0.1, 0.200617, 0.4]),
        ("cxcywh", "normalized", [0.200309, 0.3, 0.200617, 0.4]),
    ],
)
def test_box_formats(box_format: BoxFormat, units: Units, expected: list[float]) -> None:
    assert convert_box(ANSWER.detections[0].box_xyxy_px, box_format, units, 200, 100) == pytest.approx(expected)


def test_json_is_the_contracts() -> None:
    assert orjson.loads(json_body([ANSWER, EMPTY], MANIFEST, DetectOptions(), "id-1")) == {
        "model": {"name": "bright", "version": "7"},
        "images": [
            {
                "width": 200,
                "height": 100,
                "detections": [{"label": "red", "class_id": 1, "score": 0.876543, "box": [20, 10, 60.123, 50]}],
            },
            {"error": {"code": "image_empty", "message": "no bytes"}},
        ],
        "request_id": "id-1",
    }


def test_coco_is_a_dataset() -> None:
    content = orjson.loads(coco_body([EMPTY, ANSWER], MANIFEST.categories, ["a.png", "b.png"]))
    assert content["images"] == [
        {"id": 0, "file_name": "a.png", "error": {"code": "image_empty", "message": "no bytes"}},
        {"id": 1, "file_name": "b.png", "width": 200, "height": 100},
    ]
    assert content["categories"] == [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}, {"id": 5, "name": "blue"}]
    assert content["annotations"] == [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 1,
            "bbox": [20, 10, 40.123, 40],
            "area": pytest.approx(1604.92),
            "iscrowd": 0,
            "score": 0.876543,
        }
    ]


@pytest.mark.parametrize(
    ("outcomes", "error", "status"),
    [
        ([EMPTY], ImageEmpty, 422),
        ([ImageTooLarge("1")], ImageTooLarge, 413),
        ([FormatUnsupported("1")], FormatUnsupported, 415),
        ([EngineFailed("1")], EngineFailed, 500),
        ([EMPTY, EMPTY], ImageEmpty, 422),
        ([ImageTooLarge("1"), ImageTooLarge("2")], ImageTooLarge, 413),
        ([EMPTY, ImageTooLarge("2")], NothingReadable, 422),
        ([EMPTY, EngineFailed("2")], EngineFailed, 500),
        ([ANSWER, DeadlinePassed("2")], DeadlinePassed, 504),
        ([EMPTY, BadParameter("2")], BadParameter, 400),
    ],
)
def test_when_there_is_no_answer(outcomes: list[ServiceError], error: type[ServiceError], status: int) -> None:
    with pytest.raises(error) as caught:
        check_outcomes(outcomes)
    assert type(caught.value) is error
    assert caught.value.status == status


def test_one_answer_is_enough() -> None:
    check_outcomes([EMPTY, ANSWER, EngineFailed("x")])


def test_every_unreadable_image_is_named() -> None:
    with pytest.raises(NothingReadable, match="none of 2 images could be read: 0: no bytes; 1: 9x9 exceeds 80 pixels"):
        check_outcomes([EMPTY, ImageTooLarge("9x9 exceeds 80 pixels")])


def test_server_timing() -> None:
    times = [StageTimes(admit=1, decode=2.345, inference=9), StageTimes(decode=3, queue=4)]
    assert slowest(times) == times[0]
    assert server_timing(times[0]) == (
        "admit;dur=1.00, decode;dur=2.35, preprocess;dur=0.00, queue;dur=0.00, inference;dur=9.00, postprocess;dur=0.00"
    ).replace("2.35", f"{2.345:.2f}")
    assert slowest([]) == StageTimes()
