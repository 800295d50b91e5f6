"""What Prometheus scrapes; every metric's name is here and nowhere else."""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from bundle import Manifest
from server.batch_queue import LEAVE_REASONS, Batch
from server.gpu import gpu_collector
from server.timing import STAGES, StageTimes
from server.version import version

if TYPE_CHECKING:
    from server.gate import Verdict

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
_COUNTED_TOGETHER = 64
_RATIOS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)


class Metrics:
    """The metrics of one application, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        self.requests = Counter(
            "ddetr_requests", "Requests by route and HTTP status.", ["route", "status"], registry=self._registry
        )
        self.images = Counter("ddetr_images", "Images by what became of them.", ["outcome"], registry=self._registry)
        self.request_latency = Histogram(
            "ddetr_request_latency_seconds",
            "Seconds from the arrival of a request to /detect to its answer with boxes.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.rejected = Counter(
            "ddetr_rejected", "Requests to /detect refused, by error code.", ["reason"], registry=self._registry
        )
        self._stage_latency = Histogram(
            "ddetr_stage_latency_seconds",
            "Seconds an image spent in a stage.",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._batch_size = Histogram(
            "ddetr_batch_size", "Images in a batch.", buckets=_BATCH_SIZES, registry=self._registry
        )
        self._batches = Counter(
            "ddetr_batches", "Batches by why they left the queue.", ["reason"], registry=self._registry
        )
        self.engine_restarts = Counter(
            "ddetr_engine_restarts",
            "Engines lost and replaced, by how they were lost.",
            ["reason"],
            registry=self._registry,
        )
        self.engine_builds = Counter(
            "ddetr_engine_builds",
            "TensorRT engines built beside serving, by what became of it.",
            ["outcome"],
            registry=self._registry,
        )
        self._padding_ratio = Histogram(
            "ddetr_padding_ratio",
            "Share of a batch's pixels that are padding.",
            buckets=_RATIOS,
            registry=self._registry,
        )
        self._queue_depth = Gauge("ddetr_queue_depth", "Images waiting for an engine.", registry=self._registry)
        self.in_flight = Gauge(
            "ddetr_requests_in_flight", "Requests to /detect that are not answered yet.", registry=self._registry
        )
        Gauge(
            "ddetr_build_info", "The software in service; always 1.", ["version", "python"], registry=self._registry
        ).labels(version(), platform.python_version()).set(1)
        ProcessCollector(registry=self._registry)  # memory, CPU time, open files, start
        self._held_bytes = Gauge(
            "ddetr_held_bytes", "Bytes of uploads not yet decoded, and of bodies on their way.", registry=self._registry
        )
        self._model_info = Gauge(
            "ddetr_model_info",
            "The model in service; always 1.",
            ["name", "version", "variant", "precision", "engine"],
            registry=self._registry,
        )
        self.parity_failures = Counter(
            "ddetr_parity_failures",
            "Engines not served because their answers are wrong.",
            ["engine"],
            registry=self._registry,
        )
        self._parity_passed = Gauge(
            "ddetr_parity_passed",
            "1: the engines in service answer as their bundle's proof says; 0: it has none, or was not asked.",
            registry=self._registry,
        )
        self._parity_fallback = Gauge(
            "ddetr_parity_fallback",
            "1: an engine in service stands in for a better one whose answers are wrong.",
            registry=self._registry,
        )
        self._gate_seconds = Gauge(
            "ddetr_gate_seconds", "Seconds that comparing the engines in service took.", registry=self._registry
        )
        self._engine_info = Gauge(
            "ddetr_engine_info",
            "An engine in service, and how it was found right; always 1.",
            ["engine", "precision", "gate"],
            registry=self._registry,
        )
        self.swaps = Counter(
            "ddetr_bundle_swaps", "Swaps to another bundle, by their outcome.", ["outcome"], registry=self._registry
        )
        self.shadow_images = Counter(
            "ddetr_shadow_images",
            "Live pictures shown to a bundle beside the one in service, by how the answers compare.",
            ["outcome"],
            registry=self._registry,
        )
        if (gpus := gpu_collector()) is not None:
            self._registry.register(gpus)
        # Children made here show as 0 from the start, so that rates and alerts have something to look at.
        self._stages = [self._stage_latency.labels(stage) for stage in STAGES]
        self._answered = self.images.labels("ok")
        self._uncounted: deque[StageTimes] = deque()
        for reason in LEAVE_REASONS:
            self._batches.labels(reason)
        for how in ("died", "hung"):
            self.engine_restarts.labels(how)
        for outcome in ("built", "failed"):
            self.engine_builds.labels(outcome)
        for outcome in ("promoted", "rejected", "rolled_back"):
            self.swaps.labels(outcome)
        for outcome in ("agreed", "disagreed", "failed", "dropped", "too_large"):
            self.shadow_images.labels(outcome)

    def watch_queue(self, depth: Callable[[], int], held_bytes: Callable[[], int]) -> None:
        """Ask at every scrape for the queue's length, and for the bytes held."""
        self._queue_depth.set_function(depth)
        self._held_bytes.set_function(held_bytes)

    def set_model(self, manifest: Manifest, engine_name: str) -> None:
        """Name the model in service, instead of any before."""
        self._model_info.clear()
        self._model_info.labels(
            manifest.model.name, manifest.model.version, manifest.variant, manifest.precision, engine_name
        ).set(1)

    def set_verdicts(self, verdicts: Sequence[Verdict]) -> None:
        """Tell how each engine in service was found right, instead of any before."""
        self._parity_passed.set(all(verdict.result == "passed" for verdict in verdicts))
        self._parity_fallback.set(any(verdict.passed_over for verdict in verdicts))
        self._gate_seconds.set(sum(verdict.seconds for verdict in verdicts))
        self._engine_info.clear()
        for verdict in verdicts:
            self._engine_info.labels(verdict.engine, verdict.precision, verdict.result).set(1)

    def observe_image(self, times: StageTimes) -> None:
        """An image has been answered. It is counted with others, or when somebody asks: together they cost half."""
        self._uncounted.append(times)
        if len(self._uncounted) >= _COUNTED_TOGETHER:
            self._count_images()

    def _count_images(self) -> None:
        while True:  # in the event loop, and in a thread that tells the metrics: each takes others
            try:
                times = self._uncounted.popleft()
            except IndexError:
                return
            self._answered.inc()
            for ms, histogram in zip(times, self._stages, strict=True):
                histogram.observe(ms / 1e3)

    def observe_batch(self, batch: Batch) -> None:
        """A batch leaves for an engine."""
        filled = sum(entry.image.pixels.shape[0] * entry.image.pixels.shape[1] for entry in batch.entries)
        area = batch.canvas.height * batch.canvas.width * len(batch.entries)
        self._batch_size.observe(len(batch.entries))
        self._batches.labels(batch.reason).inc()
        self._padding_ratio.observe(1 - filled / area)

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        self._count_images()
        return generate_latest(self._registry)
