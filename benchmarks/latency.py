"""Milliseconds per image of a bundle's graph in ONNX Runtime on the CPU, at its own resolution.

python -m benchmarks.latency --bundle models/blood-cells --threads 2
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime

import plugins
from benchmarks.machine import machine
from bundle import read_bundle

WARM_UP, ROUNDS = 5, 4


def main() -> int:
    """Print the median, the best and the 95th percentile for each batch size on the first landscape canvas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--runs", type=int, default=60)
    args = parser.parse_args()
    bundle = read_bundle(args.bundle)
    libraries = {"function": None, "native": plugins.onnxruntime_library()}
    if libraries["native"] is None:
        del libraries["native"]
    rule = bundle.manifest.resize
    canvas = min(
        (c for c in bundle.manifest.canvases if c.height == rule.shortest or c.width >= c.height),
        key=lambda c: (abs(c.height - rule.shortest), abs(c.width - rule.longest)),
    )
    print(f"{machine()}; onnxruntime {onnxruntime.__version__}, {args.threads} threads")
    print(f"{'canvas':>10}{'batch':>7}{'attention':>11}{'median':>9}{'best':>9}{'p95':>9}   ms per image")
    rng = np.random.default_rng(0)
    for batch in args.batch_sizes:
        images = rng.integers(0, 256, (batch, canvas.height, canvas.width, 3), dtype=np.uint8)
        feeds = {"images": images, "sizes": np.tile(np.array([[canvas.height, canvas.width]]), (batch, 1))}
        took: dict[str, list[float]] = {name: [] for name in libraries}
        for _ in range(ROUNDS):
            # In turns, one session at a time: the threads of a second one would spin beside the first.
            for name, library in libraries.items():
                session = _session(bundle.onnx_path, args.threads, library)
                for run in range(WARM_UP + args.runs // ROUNDS):
                    started = time.perf_counter()
                    session.run(None, feeds)
                    if run >= WARM_UP:
                        took[name].append((time.perf_counter() - started) * 1e3 / batch)
                del session
        for name, times in took.items():
            p95 = sorted(times)[int(0.95 * (len(times) - 1))]
            median = statistics.median(times)
            print(f"{canvas!s:>10}{batch:>7}{name:>11}{median:>9.1f}{min(times):>9.1f}{p95:>9.1f}")
    return 0


def _session(model: Path, threads: int, library: Path | None) -> onnxruntime.InferenceSession:
    """With the native kernel's library, or with the function that the model carries."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    raise SystemExit(main())
