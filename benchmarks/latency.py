"""Milliseconds per image of a bundle's graph in ONNX Runtime on the CPU, at its own resolution.

python -m benchmarks.latency --bundle models/blood-cells --threads 2
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks.machine import machine
from bundle import read_bundle


def main() -> int:
    """Print the median, the best and the 95th percentile for each batch size on the first landscape canvas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--runs", type=int, default=60)
    args = parser.parse_args()
    bundle = read_bundle(args.bundle)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = onnxruntime.InferenceSession(str(bundle.onnx_path), options, providers=["CPUExecutionProvider"])
    rule = bundle.manifest.resize
    canvas = min(
        (c for c in bundle.manifest.canvases if c.height == rule.shortest or c.width >= c.height),
        key=lambda c: (abs(c.height - rule.shortest), abs(c.width - rule.longest)),
    )
    print(f"{machine()}; onnxruntime {onnxruntime.__version__}, {args.threads} threads")
    print(f"{'canvas':>10}{'batch':>7}{'median':>9}{'best':>9}{'p95':>9}   ms per image")
    rng = np.random.default_rng(0)
    for batch in args.batch_sizes:
        images = rng.integers(0, 256, (batch, canvas.height, canvas.width, 3), dtype=np.uint8)
        feeds = {"images": images, "sizes": np.tile(np.array([[canvas.height, canvas.width]]), (batch, 1))}
        took = []
        for run in range(args.runs + 5):
            started = time.perf_counter()
            session.run(None, feeds)
            if run >= 5:
                took.append((time.perf_counter() - started) * 1e3 / batch)
        took.sort()
        p95 = took[int(0.95 * (len(took) - 1))]
        print(f"{canvas!s:>10}{batch:>7}{statistics.median(took):>9.1f}{took[0]:>9.1f}{p95:>9.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
