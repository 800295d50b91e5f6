"""Stage times, Server-Timing, and the histograms: one and the same figures."""

import http.client
import re
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.settings import Settings
from server.timing import STAGES, StageTimes, server_timing, slowest, until_answered
from tests.server.fake_engine import FakeEngine
from tests.server.live import live
from tests.server.pictures import RED, encode, rectangle

ENGINE_S = 0.04
REQUESTS = 8
SHARE = 0.05  # of a request's time, that stages may leave out
HEADER_MS = 0.005  # to which Server-Timing is rounded


class Slow(FakeEngine):
    def infer(self, inputs: Any) -> Any:
        time.sleep(ENGINE_S)
        return super().infer(inputs)


def stages(header: str) -> dict[str, float]:
    return {name: float(ms) for name, ms in (part.split(";dur=") for part in header.split(", "))}


def value(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def post_several(settings: Settings, engine: FakeEngine, count: int) -> tuple[dict[str, float], str]:
    """Server-Timing of a request with `count` images, and the metrics after it."""
    with TestClient(create_app(settings, engine)) as client:
        files = [("images", (str(index), encode(rectangle(RED)))) for index in range(count)]
        header = stages(client.post("/detect", files=files).headers["server-timing"])
        return header, client.get("/metrics").text


def test_stages_over_http_add_up_to_the_requests_and_to_the_histograms(settings: Settings) -> None:
    picture = encode(rectangle(RED))
    headers = []
    with live(create_app(settings, Slow())) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        began_s = time.monotonic()
        for _ in range(REQUESTS):
            connection.request("POST", "/detect", picture, {"Content-Type": "image/png"})
            response = connection.getresponse()
            assert (response.status, bool(response.read())) == (200, True)
            headers.append(stages(response.headers["Server-Timing"]))
        client_ms = (time.monotonic() - began_s) * 1e3
        connection.request("GET", "/metrics")
        metrics = connection.getresponse().read().decode()
        connection.close()

    measured_ms = value(metrics, "ddetr_request_latency_seconds_sum") * 1e3
    summed_ms = sum(sum(each.values()) for each in headers)
    assert all(each["inference"] >= ENGINE_S * 1e3 - HEADER_MS for each in headers)
    for stage in set(STAGES) - {"inference"}:  # they do next to nothing here, so their least has nothing else's time
        assert min(each[stage] for each in headers) < ENGINE_S * 1e3 / 2, stage
    assert (1 - SHARE) * measured_ms <= summed_ms <= measured_ms + REQUESTS * len(STAGES) * HEADER_MS
    assert measured_ms <= client_ms
    for stage in STAGES:
        histogram_ms = value(metrics, f'ddetr_stage_latency_seconds_sum{{stage="{stage}"}}') * 1e3
        assert histogram_ms == pytest.approx(sum(each[stage] for each in headers), abs=REQUESTS * HEADER_MS)
        assert value(metrics, f'ddetr_stage_latency_seconds_count{{stage="{stage}"}}') == REQUESTS


def test_of_several_images_the_slowest_tells_what_the_request_waited_for(settings: Settings) -> None:
    header, metrics = post_several(settings.model_copy(update={"max_batch_size": 1}), Slow(), 4)
    measured_ms = value(metrics, "ddetr_request_latency_seconds_sum") * 1e3
    assert (1 - SHARE) * measured_ms <= sum(header.values()) <= measured_ms + len(STAGES) * HEADER_MS
    assert header["queue"] + header["inference"] >= 4 * ENGINE_S * 1e3


def test_waiting_for_a_decoding_thread_is_decoding(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from server import service

    preprocess = service.preprocess

    def slow_preprocess(*arguments: Any) -> Any:
        time.sleep(ENGINE_S)
        return preprocess(*arguments)

    monkeypatch.setattr(service, "preprocess", slow_preprocess)
    header, _ = post_several(settings.model_copy(update={"decode_threads": 1}), FakeEngine(), 3)
    assert header["decode"] >= 2 * ENGINE_S * 1e3
    assert header["preprocess"] >= ENGINE_S * 1e3 - HEADER_MS


def test_the_slowest_image_fills_the_request() -> None:
    times = [StageTimes(admit=1, decode=2, queue=30), StageTimes(admit=1, decode=9, queue=4)]
    answered = until_answered(times, 40)
    assert [each.postprocess for each in answered] == [7, 7]
    assert slowest(answered) == answered[0]
    assert slowest(answered).total == 40
    assert server_timing(answered[0]).startswith("admit;dur=1.00, decode;dur=2.00, ")
