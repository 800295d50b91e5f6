"""Utilisation and memory of the host's NVIDIA GPUs, read from the driver at every scrape."""

import importlib
from collections.abc import Iterator
from types import ModuleType

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class GpuCollector(Collector):
    """Three gauges of each GPU, by its index. Tested with a stand-in for the driver's library; not yet run on a GPU."""

    def __init__(self, nvml: ModuleType) -> None:
        self._nvml = nvml

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read the driver; a GPU that does not answer is left out of this scrape."""
        utilization = GaugeMetricFamily(
            "ddetr_gpu_utilization_ratio", "Share of time the GPU was busy.", labels=["gpu"]
        )
        memory = GaugeMetricFamily("ddetr_gpu_memory_used_bytes", "Memory in use on the GPU.", labels=["gpu"])
        total = GaugeMetricFamily("ddetr_gpu_memory_total_bytes", "Memory that the GPU has.", labels=["gpu"])
        for index in range(self._nvml.nvmlDeviceGetCount()):
            try:
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                busy_percent = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu
                held = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            except self._nvml.NVMLError:
                continue
            utilization.add_metric([str(index)], busy_percent / 100)
            memory.add_metric([str(index)], held.used)
            total.add_metric([str(index)], held.total)
        yield utilization
        yield memory
        yield total


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
