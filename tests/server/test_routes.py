"""The service over HTTP, with an engine that finds what is bright."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.ExifTags import Base
from starlette.testclient import TestClient

from bundle import Bundle, Canvas
from server.app import create_app
from server.draw import color_of
from server.errors import StartupError
from server.settings import Settings
from tests.server.fake_engine import MANIFEST, FakeEngine
from tests.server.pictures import BLUE, BOX, GREEN, HEIGHT, RED, WIDTH, encode, poison, rectangle

PNG = {"Content-Type": "image/png"}


def post(client: TestClient, data: bytes | None = None, query: str = "", **headers: str) -> Any:
    return client.post(
        f"/detect?{query}", content=encode(rectangle(RED)) if data is None else data, headers=PNG | headers
    )


def boxes(response: Any) -> list[list[float]]:
    assert response.status_code == 200, response.text
    return [detection["box"] for detection in response.json()["images"][0]["detections"]]


def error(response: Any) -> tuple[int, str, str]:
    content = response.json()
    assert content.keys() == {"error", "request_id"}
    assert content["request_id"] == response.headers["x-request-id"]
    assert content["error"].keys() == {"code", "message"}
    return response.status_code, content["error"]["code"], content["error"]["message"]


def test_a_raw_image_gets_the_contracts_answer(client: TestClient) -> None:
    response = post(client, **{"X-Request-Id": "abc-123"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == "abc-123"
    assert response.json() == {
        "model": {"name": "bright", "version": "7"},
        "images": [
            {
                "width": WIDTH,
                "height": HEIGHT,
                "detections": [{"label": "red", "class_id": 1, "score": 0.9, "box": list(BOX)}],
            }
        ],
        "request_id": "abc-123",
    }


def test_multipart_takes_several_images_in_order(client: TestClient) -> None:
    files = [("images", ("a.png", encode(rectangle(color)), "image/png")) for color in (RED, GREEN, BLUE)]
    files.insert(1, ("image", ("b.jpg", encode(rectangle(size=(64, 200)), "JPEG"), "image/jpeg")))
    content = client.post("/detect", files=files).json()
    assert [(image["width"], image["height"]) for image in content["images"]] == [
        (96, 64),
        (64, 200),
        (96, 64),
        (96, 64),
    ]
    assert [content["images"][index]["detections"][0]["class_id"] for index in (0, 2, 3)] == [1, 2, 5]


def test_json_with_base64(client: TestClient) -> None:
    encoded = base64.b64encode(encode(rectangle(RED))).decode()
    assert boxes(client.post("/detect", json={"images": [{"b64": encoded}]})) == [list(BOX)]


def test_a_large_picture_gets_boxes_in_its_own_pixels(client: TestClient) -> None:
    picture = rectangle(RED, (120, 80, 600, 320), (960, 640))
    assert boxes(post(client, encode(picture)))[0] == pytest.approx([120, 80, 600, 320], abs=10)  # 1 px of the canvas


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_boxes_are_in_the_displayed_orientation(client: TestClient, orientation: int) -> None:
    turned = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[Base.Orientation] = orientation
    response = post(client, encode(rectangle(RED).transpose(turned[orientation]), exif=exif))
    assert boxes(response) == [list(BOX)]
    assert (response.json()["images"][0]["width"], response.json()["images"][0]["height"]) == (WIDTH, HEIGHT)


def test_an_unreadable_image_has_its_error_in_its_place(client: TestClient) -> None:
    files = [("images", ("a", encode(rectangle(RED)))), ("images", ("b", b"nonsense")), ("images", ("c", b""))]
    content = client.post("/detect", files=files).json()["images"]
    assert content[0]["detections"]
    assert content[1]["error"]["code"] == "image_unreadable"
    assert content[2] == {"error": {"code": "image_empty", "message": "no bytes where an image should be"}}


def test_only_unreadable_images_are_422(client: TestClient) -> None:
    assert error(post(client, b"nonsense"))[:2] == (422, "image_unreadable")
    files = [("images", ("a", b"nonsense")), ("images", ("b", b""))]
    status, code, message = error(client.post("/detect", files=files))
    assert (status, code) == (422, "nothing_readable")
    assert "0: not a picture" in message


def test_poison_in_a_batch_has_its_error_in_its_place(client: TestClient) -> None:
    assert error(post(client, poison()))[:2] == (500, "engine_failed")
    files = [("images", ("a", encode(rectangle(RED)))), ("images", ("b", poison()))]
    content = client.post("/detect", files=files).json()["images"]
    assert content[0]["detections"]
    assert content[1]["error"]["code"] == "engine_failed"


THREE = encode(Image.fromarray(np.maximum.reduce([np.asarray(rectangle(color, box)) for color, box in (
    (RED, (0, 0, 20, 20)), (GREEN, (30, 0, 60, 20)), (BLUE, (70, 30, 96, 64))
)])))  # fmt: skip


@pytest.mark.parametrize(
    ("query", "labels"),
    [
        ("", ["red", "green"]),
        ("threshold=0", ["red", "green", "blue"]),
        ("threshold=0.7", ["red"]),
        ("threshold=1", []),
        ("threshold=0&max_detections=2", ["red", "green"]),
        ("threshold=0&classes=blue,red", ["red", "blue"]),
        ("threshold=0&classes=5", ["blue"]),
        ("threshold=0&classes=GREEN&max_detections=1", ["green"]),
    ],
)
def test_choosing_detections(client: TestClient, query: str, labels: list[str]) -> None:
    content = post(client, THREE, query).json()["images"][0]["detections"]
    assert [detection["label"] for detection in content] == labels


@pytest.mark.parametrize(
    ("query", "box"),
    [
        ("box_format=xywh", [12, 8, 48, 24]),
        ("box_format=cxcywh", [36, 20, 48, 24]),
        ("units=normalized", [0.125, 0.125, 0.625, 0.5]),
        ("units=normalized&box_format=xywh", [0.125, 0.125, 0.5, 0.375]),
    ],
)
def test_forms_of_boxes(client: TestClient, query: str, box: list[float]) -> None:
    assert boxes(post(client, query=query)) == [pytest.approx(box)]


def test_coco(client: TestClient) -> None:
    content = post(client, query="format=coco").json()
    assert content["images"] == [{"id": 0, "width": WIDTH, "height": HEIGHT}]
    assert content["annotations"][0]["bbox"] == [12, 8, 48, 24]


def test_image(client: TestClient) -> None:
    response = post(client, encode(rectangle(RED, (30, 30, 80, 60))), "format=image")
    assert response.headers["content-type"] == "image/png"
    assert "inference" in response.headers["server-timing"]
    drawn = Image.open(io.BytesIO(response.content))
    assert drawn.size == (WIDTH, HEIGHT)
    assert drawn.getpixel((30, 45)) == color_of(1)
    files = [("images", ("a", encode(rectangle())))] * 2
    assert error(client.post("/detect?format=image", files=files))[0] == 400


@pytest.mark.parametrize(
    "query", ["threshold=2", "threshold=nan", "classes=pink", "units=inch", "colour=red", "format=xml"]
)
def test_bad_parameters_are_400_and_named(client: TestClient, query: str) -> None:
    status, code, message = error(post(client, query=query))
    assert (status, code) == (400, "bad_parameter")
    name, _, value = query.partition("=")
    assert message.startswith(name)
    assert value in message or "no such parameter" in message


def test_other_content_types_are_415(client: TestClient) -> None:
    assert error(client.post("/detect", content=b"x", headers={"Content-Type": "text/plain"}))[:2] == (
        415,
        "unsupported_media_type",
    )
    assert error(client.post("/detect", content=b"x"))[0] == 415
    assert error(post(client, encode(rectangle(), "GIF")))[:2] == (415, "unsupported_format")


def test_broken_bodies_are_400(client: TestClient) -> None:
    assert error(client.post("/detect", content=b"{", headers={"Content-Type": "application/json"}))[:2] == (
        400,
        "bad_body",
    )
    form = {"Content-Type": "multipart/form-data"}
    assert error(client.post("/detect", content=b"--x", headers=form))[:2] == (400, "bad_body")


def test_too_much_is_413(settings: Settings, engine: FakeEngine) -> None:
    limits = {"max_body_bytes": 20_000, "max_image_pixels": 10_000, "max_images_per_request": 2}
    with TestClient(create_app(settings.model_copy(update=limits), engine)) as client:
        assert error(post(client, bytes(20_001)))[:2] == (413, "too_many_bytes")
        chunked = client.post("/detect", content=iter([bytes(15_000)] * 2), headers=PNG)
        assert error(chunked)[:2] == (413, "too_many_bytes")
        assert error(post(client, encode(Image.new("L", (101, 100)))))[:2] == (413, "too_many_pixels")
        files = [("images", ("a", encode(rectangle())))] * 3
        assert error(client.post("/detect", files=files))[:2] == (413, "too_many_images")
        assert boxes(post(client)) == [list(BOX)]


def test_more_images_than_the_queue_can_ever_hold_are_413_not_429(settings: Settings, engine: FakeEngine) -> None:
    with TestClient(create_app(settings.model_copy(update={"queue_limit": 2}), engine)) as client:
        response = client.post("/detect", files=[("images", (name, encode(rectangle()))) for name in "abc"])
        assert error(response)[:2] == (413, "too_many_images")


def test_a_shape_that_no_canvas_holds_has_its_error_in_its_place(settings: Settings) -> None:
    wide_only = MANIFEST.model_copy(update={"canvases": (Canvas(height=64, width=96),)})
    tall, wide = encode(rectangle(RED, (5, 5, 15, 15), (20, 60))), encode(rectangle(RED, (5, 5, 15, 15), (60, 20)))
    with TestClient(create_app(settings, FakeEngine(wide_only))) as client:
        images = client.post("/detect", files=[("images", ("a", tall)), ("images", ("b", wide))]).json()["images"]
        assert images[0]["error"]["code"] == "unsupported_shape"
        assert len(images[1]["detections"]) == 1
        assert error(post(client, tall))[:2] == (422, "unsupported_shape")


def test_large_bodies_of_every_type_are_taken_apart(client: TestClient) -> None:
    noise = np.random.default_rng(0).integers(0, 100, (800, 1200, 3), np.uint8)
    noise[100:400, 150:750] = 255
    data = encode(Image.fromarray(noise), "BMP")
    assert len(data) > 1 << 20
    found = [
        boxes(client.post("/detect", files=[("images", ("a", data))])),
        boxes(client.post("/detect", json={"images": [{"b64": base64.b64encode(data).decode()}]})),
    ]
    for each in found:
        assert each[0] == pytest.approx([150, 100, 750, 400], abs=13)  # 1 px of the canvas


@pytest.mark.parametrize("given", ["0", "-3", "soon", "nan"])
def test_bad_timeouts_are_400(client: TestClient, given: str) -> None:
    assert error(post(client, **{"X-Timeout-Ms": given}))[:2] == (400, "bad_parameter")


def test_request_ids_that_cannot_be_are_replaced(client: TestClient) -> None:
    for given in ("", "x" * 200, "two words"):
        response = post(client, **{"X-Request-Id": given})
        assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
        assert response.json()["request_id"] == response.headers["x-request-id"]
    assert client.get("/nowhere", headers={"X-Request-Id": "kept"}).headers["x-request-id"] == "kept"


def test_server_timing_has_every_stage(client: TestClient) -> None:
    header = post(client).headers["server-timing"]
    stages = dict(part.split(";dur=") for part in header.split(", "))
    assert list(stages) == ["admit", "decode", "preprocess", "queue", "inference", "postprocess"]
    assert all(float(value) >= 0 for value in stages.values())


def test_wrong_paths_and_methods_have_error_bodies(client: TestClient) -> None:
    assert error(client.get("/nowhere"))[:2] == (404, "not_found")
    assert error(client.post("/detect/"))[:2] == (404, "not_found")
    wrong = client.get("/detect")
    assert error(wrong)[:2] == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


def test_health(client: TestClient) -> None:
    for path in ("/livez", "/readyz"):
        assert client.get(path).json() == {"status": "ok"}


def test_not_ready_before_the_start(settings: Settings) -> None:
    client = TestClient(create_app(settings, FakeEngine()))  # without its lifespan
    response = client.get("/readyz")
    assert (response.status_code, response.json()) == (503, {"status": "starting"})
    assert boxes(post(client)) == [list(BOX)]  # a server that knows no lifespan still gets answers


def test_model_tells_what_is_served(client: TestClient) -> None:
    content = client.get("/model").json()
    assert content["model"] == {"name": "bright", "version": "7"}
    assert content["categories"] == {"1": "red", "2": "green", "5": "blue"}
    assert content["engine"] == "fake"
    assert content["resize"] == {"shortest": 64, "longest": 96}


def test_docs_need_nothing_from_outside(client: TestClient) -> None:
    page = client.get("/docs").text
    links = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert links
    for link in links:
        assert not re.match(r"\w+:|//", link)
        assert client.get("/" + link).status_code == 200
    assert 'fetch("openapi.json"' in page
    assert client.get("/redoc").status_code == 404


def test_docs_describe_detect(client: TestClient) -> None:
    detect = client.get("/openapi.json").json()["paths"]["/detect"]["post"]
    names = {parameter["name"] for parameter in detect["parameters"]}
    assert names == {
        "threshold",
        "max_detections",
        "classes",
        "box_format",
        "units",
        "format",
        "X-Timeout-Ms",
        "X-Priority",
        "X-Request-Id",
        "X-API-Key",
    }
    assert set(detect["requestBody"]["content"]) == {"multipart/form-data", "image/*", "application/json"}
    assert set(detect["responses"]) >= {"200", "400", "413", "415", "422", "429", "500", "503", "504"}


def test_metrics_have_the_contracts_names(client: TestClient) -> None:
    post(client)
    post(client, b"nonsense")
    client.get("/nowhere")
    text = client.get("/metrics").text
    for line in (
        'ddetr_requests_total{route="/detect",status="200"} 1.0',
        'ddetr_requests_total{route="/detect",status="422"} 1.0',
        'ddetr_requests_total{route="unmatched",status="404"} 1.0',
        'ddetr_images_total{outcome="ok"} 1.0',
        'ddetr_images_total{outcome="image_unreadable"} 1.0',
        "ddetr_request_latency_seconds_count 1.0",
        'ddetr_stage_latency_seconds_count{stage="decode"} 1.0',
        'ddetr_stage_latency_seconds_count{stage="inference"} 1.0',
        "ddetr_batch_size_count 1.0",
        'ddetr_batches_total{reason="idle"} 1.0',
        'ddetr_batches_total{reason="full"} 0.0',
        "ddetr_queue_depth 0.0",
        "ddetr_padding_ratio_count 1.0",
        'ddetr_rejected_total{reason="image_unreadable"} 1.0',
        'ddetr_model_info{engine="fake",name="bright",precision="fp32",variant="fake",version="7"} 1.0',
    ):
        assert line in text.splitlines()


def test_two_apps_have_metrics_of_their_own(settings: Settings) -> None:
    with TestClient(create_app(settings, FakeEngine())) as one, TestClient(create_app(settings, FakeEngine())) as two:
        post(one)
        assert "ddetr_batch_size_count 0.0" in two.get("/metrics").text


@pytest.fixture
def guarded(settings: Settings, engine: FakeEngine) -> Iterator[TestClient]:
    keys = Settings(api_keys="one,two").api_keys
    with TestClient(create_app(settings.model_copy(update={"api_keys": keys}), engine)) as client:
        yield client


def test_api_keys_guard_all_but_health(guarded: TestClient) -> None:
    for path in ("/livez", "/readyz"):
        assert guarded.get(path).status_code == 200
    pages = ("/", "/sample.jpg", "/docs", "/static-offline-docs/swagger-ui.css")
    for path in ("/model", "/metrics", "/openapi.json", *pages):
        assert error(guarded.get(path))[:2] == (401, "unauthorized")
        assert guarded.get(path, headers={"Authorization": "Bearer two"}).status_code == 200
    for path in ("/nowhere", "/model/", "/static-offline-docs", "/livez/../model"):
        assert guarded.get(path, follow_redirects=False).status_code == 401  # nor is it told what there is
    refused = post(guarded)
    assert error(refused)[:2] == (401, "unauthorized")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert post(guarded, **{"X-API-Key": "one"}).status_code == 200
    text = guarded.get("/metrics", headers={"X-API-Key": "one"}).text
    assert 'ddetr_requests_total{route="/detect",status="401"} 1.0' in text
    assert 'ddetr_rejected_total{reason="unauthorized"} 1.0' in text


def test_an_error_nobody_foresaw_is_500_with_its_id(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.routes.json_body", lambda *_: 1 / 0)
    status, code, message = error(post(client, **{"X-Request-Id": 'a"b\\'}))
    assert (status, code) == (500, "internal")
    assert 'a"b\\' in message
    assert "ZeroDivisionError" in caplog.text


def test_a_bundle_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no such folder"):
        create_app(Settings(bundle=tmp_path / "absent"))


def test_a_real_bundle_answers(tiny_bundle: Bundle) -> None:
    with TestClient(create_app(Settings(bundle=tiny_bundle.path, device="cpu"))) as client:
        picture = rectangle(RED, (60, 20, 200, 90), (320, 128))
        assert boxes(post(client, encode(picture))) == [pytest.approx([60, 20, 200, 90], abs=4)]
        assert boxes(post(client, encode(picture.transpose(Image.Transpose.TRANSPOSE)))) == [
            pytest.approx([20, 60, 90, 200], abs=4)
        ]
        assert boxes(post(client, encode(Image.new("RGB", (50, 50))))) == []
        assert client.get("/model").json()["engine"].startswith("onnxruntime")
