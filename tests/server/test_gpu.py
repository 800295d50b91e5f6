"""GPU metrics, with a stand-in for the driver's library: present, absent, refusing, and hanging."""

import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import pytest

from server import gpu
from server.app import create_app
from server.metrics import Metrics
from server.settings import Settings
from tests.server.fake_engine import FakeEngine
from tests.server.live import live

LONGEST_S = 20.0


class NVMLError(Exception):
    pass


def fake_nvml(*, driver: bool = True) -> ModuleType:
    """Two GPUs, of which the second does not answer."""
    nvml = ModuleType("pynvml")

    def init() -> None:
        if not driver:
            raise NVMLError("driver not loaded")

    def handle(index: int) -> int:
        if index == 1:
            raise NVMLError("fell off the bus")
        return index

    nvml.__dict__.update(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetUtilizationRates=lambda _: SimpleNamespace(gpu=37),
        nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(used=5 * 2**30, total=8 * 2**30),
    )
    return nvml


def test_each_gpu_that_answers_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    lines = Metrics().exposition().decode().splitlines()
    assert 'ddetr_gpu_utilization_ratio{gpu="0"} 0.37' in lines
    assert 'ddetr_gpu_memory_used_bytes{gpu="0"} 5.36870912e+09' in lines
    assert 'ddetr_gpu_memory_total_bytes{gpu="0"} 8.589934592e+09' in lines
    assert not any('gpu="1"' in line for line in lines)


@pytest.mark.parametrize("nvml", [None, fake_nvml(driver=False)], ids=["no library", "no driver"])
def test_without_a_gpu_there_are_no_gpu_metrics(nvml: ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert b"ddetr_gpu" not in Metrics().exposition()


def test_a_driver_that_does_not_count_its_gpus_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml()

    def count() -> int:
        raise NVMLError("driver is being replaced")

    monkeypatch.setattr(nvml, "nvmlDeviceGetCount", count)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    text = Metrics().exposition().decode()
    assert "ddetr_requests_in_flight 0.0" in text
    assert 'gpu="' not in text


class Hanging:
    """Memory information that does not come until it is let go."""

    def __init__(self, nvml: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = threading.Semaphore(0)
        self.go_on = threading.Event()
        self._info = nvml.nvmlDeviceGetMemoryInfo
        monkeypatch.setattr(nvml, "nvmlDeviceGetMemoryInfo", self._hang)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)

    def _hang(self, handle: int) -> object:
        self.asked.release()
        assert self.go_on.wait(LONGEST_S)
        return self._info(handle)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    hanging = Hanging(fake_nvml(), monkeypatch)
    yield hanging
    hanging.go_on.set()


def test_a_driver_that_hangs_holds_no_scrape_and_one_thread(hanging: Hanging, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LONGEST_READ_S", 0.01)
    metrics = Metrics()
    for _ in range(3):
        text = metrics.exposition().decode()
        assert "ddetr_requests_in_flight 0.0" in text
        assert 'gpu="' not in text
    assert hanging.asked.acquire(timeout=LONGEST_S)
    assert not hanging.asked.acquire(blocking=False), "asked once: the others found it at work"
    hanging.go_on.set()
    monkeypatch.setattr(gpu, "LONGEST_READ_S", LONGEST_S)
    assert 'ddetr_gpu_utilization_ratio{gpu="0"} 0.37' in metrics.exposition().decode()


def test_whoever_asks_for_something_else_does_not_wait_for_the_driver(
    hanging: Hanging, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LONGEST_READ_S", LONGEST_S)
    with live(create_app(settings, FakeEngine())) as port, ThreadPoolExecutor(1) as scraper:

        def get(path: str) -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=LONGEST_S) as response:
                return str(response.read().decode())

        scrape = scraper.submit(get, "/metrics")
        try:
            assert hanging.asked.acquire(timeout=LONGEST_S)
            assert get("/livez") == '{"status":"ok"}'
            assert not scrape.done()
        finally:
            hanging.go_on.set()
        assert 'ddetr_gpu_utilization_ratio{gpu="0"} 0.37' in scrape.result(LONGEST_S)
