"""GPU metrics, with a stand-in for the driver's library: present, absent, and refusing."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from server.metrics import Metrics


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
