"""Every engine that this machine has for a bundle, side by side: images a second, with and without copying ahead.

python -m benchmarks.engines --bundle DIR [--device cuda:0] [--max-batch-size 8] [--seconds 2]

One line a canvas, batch size and engine. "in turn": a batch is laid, run and waited for, then the next. "ahead": the
next batch is laid, and for a GPU copied, in another thread meanwhile, as the server does it. Engines take turns in
short pieces; the best piece counts, as whatever disturbs makes slower only. "score error": the largest difference of a
score from the best engine's.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.machine import machine
from bundle import Canvas, embedded_bundle, read_bundle
from server.engine import Engine, RawDetections, candidates, passed_over, run_engine
from server.errors import StartupError
from server.preprocess import Pixels
from server.settings import Settings

PIECES = 5


def pictures(canvas: Canvas, count: int) -> list[Pixels]:
    """Noise that fills the canvas: what is in it changes no time."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (canvas.height, canvas.width, 3), dtype=np.uint8) for _ in range(count)]


def in_turn(engine: Engine, images: Sequence[Pixels], canvas: Canvas, seconds: float) -> float:
    """Images a second."""
    began_s, batches = time.perf_counter(), 0
    while (taken_s := time.perf_counter() - began_s) < seconds:
        engine.finish(engine.infer(engine.prepare(images, canvas)))
        batches += 1
    return batches * len(images) / taken_s


def ahead(engine: Engine, images: Sequence[Pixels], canvas: Canvas, seconds: float) -> float:
    """Images a second, the next batch prepared by another thread."""
    with ThreadPoolExecutor(1) as preparing:
        prepared = preparing.submit(engine.prepare, images, canvas)
        began_s, batches = time.perf_counter(), 0
        while (taken_s := time.perf_counter() - began_s) < seconds:
            inputs = prepared.result()
            prepared = preparing.submit(engine.prepare, images, canvas)
            engine.finish(engine.infer(inputs))
            batches += 1
        prepared.result()
    return batches * len(images) / taken_s


def opened(settings: Settings) -> dict[str, Engine]:
    """The engines by their names. Prints why others are not among them."""
    bundle = read_bundle(settings.bundle)
    for why in passed_over(settings, bundle):
        print(f"not measured: {why}")
    engines = {}
    for candidate in candidates(settings, bundle):
        try:
            engine = candidate.open()
            engines[engine.name] = engine
        except StartupError as error:
            print(f"not measured: {candidate.name}: {error}")
    return engines


def measure(engines: dict[str, Engine], canvas: Canvas, count: int, seconds: float) -> None:
    """Print the lines of one canvas and batch size."""
    images = pictures(canvas, count)
    reference: RawDetections | None = None
    best = {name: [0.0, 0.0] for name in engines}
    errors = {}
    for name, engine in engines.items():
        for _ in range(2):  # whatever first times take
            run_engine(engine, images, canvas)
        raw = run_engine(engine, images, canvas)
        reference = reference or raw
        errors[name] = float(np.abs(raw.scores - reference.scores).max())
    for _ in range(PIECES):
        for name, engine in engines.items():
            for index, way in enumerate((in_turn, ahead)):
                best[name][index] = max(best[name][index], way(engine, images, canvas, seconds / PIECES / 2))
    for name, (alone, with_copies) in best.items():
        line = f"| {canvas} | {count} | {alone:.1f} | {with_copies:.1f} | {1e3 * count / with_copies:.2f} | "
        print(f"{line}{errors[name]:.1e} | {name} |", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=embedded_bundle(), metavar="DIR")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-batch-size", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line (default %(default)s)")
    asked = parser.parse_args(argv)
    engines = opened(Settings(bundle=asked.bundle, device=asked.device, max_batch_size=asked.max_batch_size))
    print(f"{machine()}\n\n| canvas | batch | images/s in turn | images/s ahead | ms a batch | score error | engine |")
    print("|---|---|---|---|---|---|---|")
    for canvas in next(iter(engines.values())).manifest.canvases:
        for count in dict.fromkeys((1, asked.max_batch_size)):
            measure(engines, canvas, count, asked.seconds)
    for engine in engines.values():
        engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
