"""A server process that says on request how much CPU time its engine has taken, and how much all else has.

`ddetr serve` in all but this: its engine is wrapped, so that what `infer` costs its thread is added up, and the threads
that ONNX Runtime starts are known, because nothing else starts threads while it loads. For every line on standard
input it prints a line of JSON: `process_s`, `event_loop_s` and `engine_s` of CPU time, `images` and `batches` so far.

For benchmarks.saturation; settings are DDETR_* variables. With `--rest SHORTEST LONGEST MS` the engine is none: it
sleeps that long a batch and answers always the same.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle import Canvas, Manifest, ModelName, ResizeRule, canvases_for, read_bundle
from server.engine import Engine, RawDetections
from server.onnxruntime_engine import OnnxRuntimeEngine
from server.preprocess import Pixels, lay_on_canvas
from server.run import serve
from server.settings import Settings

DETECTIONS, SURE = 100, 12
"""What the resting engine answers: a smear has some dozen cells."""


class RestingEngine:
    """Takes time and no CPU, as an engine on a GPU does."""

    def __init__(self, rule: ResizeRule, batch_s: float) -> None:
        self.name = "resting"
        self.manifest = Manifest(
            model=ModelName(name="resting", version="1"),
            variant="none",
            categories={1: "RBC", 2: "WBC", 3: "Platelets"},
            resize=rule,
            canvases=canvases_for(rule),
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            max_detections=DETECTIONS,
        )
        self._batch_s = batch_s
        rng = np.random.default_rng(0)
        corners = np.sort(rng.random((DETECTIONS, 2, 2), np.float32), axis=1)
        self._boxes = corners.reshape(DETECTIONS, 4)
        self._scores = np.linspace(0.99, 0.5, DETECTIONS, dtype=np.float32)
        self._scores[SURE:] = np.linspace(0.4, 0.01, DETECTIONS - SURE, dtype=np.float32)
        self._labels = rng.integers(1, 4, DETECTIONS)

    def prepare(self, images: Sequence[Pixels], canvas: Canvas) -> tuple[Pixels, NDArray[np.int64]]:
        """What the real one does."""
        return lay_on_canvas(images, canvas)

    def infer(self, inputs: tuple[Pixels, NDArray[np.int64]]) -> RawDetections:
        """The same for every image, after a rest."""
        time.sleep(self._batch_s)
        number = len(inputs[0])
        return RawDetections(
            np.tile(self._boxes, (number, 1, 1)),
            np.tile(self._scores, (number, 1)),
            np.tile(self._labels, (number, 1)),
        )

    def finish(self, outputs: RawDetections) -> RawDetections:
        """They are there already."""
        return outputs

    def close(self) -> None:
        """Nothing is held."""


class AccountedEngine:
    """An engine, and the CPU time that it takes."""

    def __init__(self, open_engine: Callable[[], Engine]) -> None:
        before = thread_ids()
        self._engine = open_engine()
        time.sleep(0.1)  # the thread that opened it has ended
        self._own_threads = thread_ids() - before
        self._lock = threading.Lock()
        self._infer_s = 0.0
        self.images = 0
        self.batches = 0
        self.name = self._engine.name
        self.manifest = self._engine.manifest
        self.finish = self._engine.finish
        self.close = self._engine.close

    def prepare(self, images: Sequence[Pixels], canvas: Canvas) -> Any:
        """The engine's own, with its images counted."""
        with self._lock:
            self.images += len(images)
        return self._engine.prepare(images, canvas)

    def infer(self, inputs: Any) -> Any:
        """The engine's own, timed by the clock of the thread it runs in."""
        started_s = time.thread_time()
        try:
            return self._engine.infer(inputs)
        finally:
            with self._lock:
                self._infer_s += time.thread_time() - started_s
                self.batches += 1

    def cpu_s(self) -> float:
        """CPU time of `infer` and of the threads that the engine started."""
        return self._infer_s + sum(map(thread_cpu_s, self._own_threads))


def thread_ids() -> set[int]:
    """Of all threads of this process, Python's and others."""
    return {int(name) for name in os.listdir("/proc/self/task")}


def thread_cpu_s(thread_id: int) -> float:
    """CPU time of a thread of this process, to the nanosecond."""
    # Linux makes a clock's id of a thread's: its complement shifted by 3, and 6 for "of a thread, as scheduled".
    return time.clock_gettime(~thread_id << 3 | 6)


def report(engines: Sequence[AccountedEngine]) -> None:
    """Answer every line on standard input."""
    for _ in sys.stdin:
        accounts = {
            "process_s": time.process_time(),
            "event_loop_s": thread_cpu_s(os.getpid()),  # the first thread has the process's id
            "engine_s": sum(engine.cpu_s() for engine in engines),
            "images": sum(engine.images for engine in engines),
            "batches": sum(engine.batches for engine in engines),
        }
        print(json.dumps(accounts), flush=True)


def main() -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rest", type=float, nargs=3, metavar=("SHORTEST", "LONGEST", "MS"))
    args = parser.parse_args()
    settings = Settings()

    def open_engine() -> Engine:
        if args.rest is not None:
            shortest, longest, rest_ms = args.rest
            return RestingEngine(ResizeRule(shortest=int(shortest), longest=int(longest)), rest_ms / 1e3)
        return OnnxRuntimeEngine(read_bundle(settings.bundle), settings)

    engines: list[AccountedEngine] = []

    def open_accounted() -> Engine:
        engines.append(AccountedEngine(open_engine))
        return engines[-1]

    threading.Thread(target=report, args=(engines,), daemon=True).start()
    return serve(settings, open_accounted)


if __name__ == "__main__":
    raise SystemExit(main())
