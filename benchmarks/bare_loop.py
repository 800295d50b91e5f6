"""Keeps the server's engine busy with a ready-made batch, and nothing else: what a server around it can hope for.

For benchmarks.saturation; settings are DDETR_* variables. For every line `SECONDS` on standard input it works so long
and prints a line of JSON: `images`, `seconds`, `cpu_s`.
"""

import io
import json
import sys
import threading
import time

import numpy as np
from PIL import Image

from bundle import read_bundle
from loadtest.payload import drawn
from server.engine import Engine
from server.onnxruntime_engine import OnnxRuntimeEngine
from server.preprocess import preprocess
from server.settings import Settings

WARM_UP = 3


def main() -> int:
    """Work on request until standard input ends."""
    settings = Settings()
    bundle = read_bundle(settings.bundle)
    engines: list[Engine] = [OnnxRuntimeEngine(bundle, settings) for _ in range(settings.engine_instances)]
    pictures = [Image.open(io.BytesIO(payload.body)) for payload in drawn(settings.max_batch_size, seed=0)]
    prepared = [preprocess(np.asarray(picture), bundle.manifest) for picture in pictures]
    canvas = prepared[0][1]
    batch = engines[0].prepare([pixels for pixels, _ in prepared], canvas)
    for engine in engines:
        for _ in range(WARM_UP):
            engine.infer(batch)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(work(engines, batch, settings.max_batch_size, float(line))), flush=True)
    return 0


def work(engines: list[Engine], batch: object, batch_size: int, duration_s: float) -> dict[str, float]:
    """Every engine in a thread of its own, for that long."""
    done = [0] * len(engines)
    started_s, cpu_s = time.perf_counter(), time.process_time()

    def keep_busy(number: int) -> None:
        while time.perf_counter() - started_s < duration_s:
            engines[number].infer(batch)
            done[number] += batch_size

    threads = [threading.Thread(target=keep_busy, args=(number,)) for number in range(len(engines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started_s
    return {"images": sum(done), "seconds": seconds, "cpu_s": time.process_time() - cpu_s}


if __name__ == "__main__":
    raise SystemExit(main())
