"""Utilisation and memory of the host's NVIDIA GPUs, read from the driver at every scrape."""

import importlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from types import ModuleType

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

LONGEST_READ_S = 1.0
"""A scrape waits no longer for the driver, which a GPU that fell off the bus may hold for good."""


@dataclass(frozen=True)
class _Reading:
    gpu: str  # its index
    busy: float  # share of time
    used_bytes: int
    total_bytes: int


class GpuCollector(Collector):
    """Three gauges of each GPU, by its index. Tested with a stand-in for the driver's library; not yet run on a GPU."""

    def __init__(self, nvml: ModuleType) -> None:
        self._nvml = nvml
        self._asked: Future[list[_Reading]] | None = None
        self._lock = threading.Lock()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read the driver, for up to LONGEST_READ_S; what does not answer is left out of this scrape."""
        utilization = GaugeMetricFamily(
            "ddetr_gpu_utilization_ratio", "Share of time the GPU was busy.", labels=["gpu"]
        )
        memory = GaugeMetricFamily("ddetr_gpu_memory_used_bytes", "Memory in use on the GPU.", labels=["gpu"])
        total = GaugeMetricFamily("ddetr_gpu_memory_total_bytes", "Memory that the GPU has.", labels=["gpu"])
        for reading in self._readings():
            utilization.add_metric([reading.gpu], reading.busy)
            memory.add_metric([reading.gpu], reading.used_bytes)
            total.add_metric([reading.gpu], reading.total_bytes)
        yield utilization
        yield memory
        yield total

    def _readings(self) -> list[_Reading]:
        with self._lock:
            if self._asked is None or self._asked.done():  # else the driver holds one thread already
                asked: Future[list[_Reading]] = Future()
                # A daemon: a driver that hangs must not keep the process from ending.
                threading.Thread(target=self._answer, args=[asked], name="gpu-metrics", daemon=True).start()
                self._asked = asked
            asked = self._asked
        try:
            return asked.result(LONGEST_READ_S)
        except TimeoutError:
            return []

    def _answer(self, asked: Future[list[_Reading]]) -> None:
        try:
            asked.set_result(list(self._read()))
        except Exception as error:
            asked.set_exception(error)

    def _read(self) -> Iterator[_Reading]:
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except self._nvml.NVMLError:
            return
        for index in range(count):
            try:
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                busy_percent = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu
                held = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            except self._nvml.NVMLError:
                continue
            yield _Reading(str(index), busy_percent / 100, held.used, held.total)


def gpu_collector() -> GpuCollector | None:
    """The collector, where nvidia-ml-py (the gpu extra) is installed and the driver answers; else None."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return GpuCollector(nvml)
