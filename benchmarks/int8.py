"""The graph in 8-bit integers beside float32 in ONNX Runtime on the CPU: milliseconds an image, and where they go.

python -m benchmarks.int8 --bundle DIR                        # AP of both is in its manifest, and printed
python -m benchmarks.int8 --graph model.onnx --size 480x640   # any served graph; ranges of random pictures: time only
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

import plugins
from benchmarks.machine import machine
from bundle import read_bundle
from export.calibrate import Feed, calibrate
from export.onnx_export import parse_canvases
from export.plain import plain_graph
from export.quantisable import layers_of
from export.quantise import quantise

WARM_UP = 2
SHOWN = 8


def main() -> int:
    """Print a table of times for each batch size, a profile of each graph, and AP of a bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundle", type=Path, help="one with model-int8.onnx (ddetr export --int8)")
    source.add_argument("--graph", type=Path, help="a served graph; it is quantised here, for its time alone")
    parser.add_argument("--size", type=parse_canvases, help="HxW of --graph's pictures, or another canvas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=10, help="turns of each graph")
    parser.add_argument("--runs", type=int, default=5, help="in a turn")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.bundle:
            bundle = read_bundle(args.bundle)
            if bundle.int8_path is None:
                parser.error(f"{args.bundle} has no graph in integers: ddetr export --int8")
            graphs = {"float32": bundle.onnx_path, "integers": bundle.int8_path}
            rule = bundle.manifest.resize
            wide = [c for c in bundle.manifest.canvases if c.width >= c.height]
            canvas = min(wide, key=lambda c: (abs(c.height - rule.shortest), abs(c.width - rule.longest)))
        else:
            if not args.size:
                parser.error("--graph needs --size")
            graphs = {"float32": args.graph, "integers": Path(folder) / "int8.onnx"}
            canvas = args.size[0]
            _quantise(args.graph, _feed(1, canvas.height, canvas.width), graphs["integers"], args.threads)
        if args.size:
            canvas = args.size[0]
        print(f"{machine()}; onnxruntime {onnxruntime.__version__}, {args.threads} threads, {canvas}")
        print(f"\n{'batch':>6}{'graph':>10}{'median':>9}{'best':>9}   ms an image, in turns")
        for batch in args.batch_sizes:
            _times(graphs, _feed(batch, canvas.height, canvas.width), args)
        for name, path in graphs.items():
            _profile(name, path, _feed(1, canvas.height, canvas.width), args.threads, Path(folder))
    if args.bundle:
        record = bundle.manifest.int8
        assert record is not None
        print(
            f"\nAP on {record.pictures} pictures: {record.ap_fp32:.4f} in float32, {record.ap_int8:.4f} in integers; "
            f"AP50 {record.ap50_fp32:.4f}, {record.ap50_int8:.4f}; {record.agreement.matched:.2%} of "
            f"{record.agreement.detections} detections found, scores {record.agreement.score_difference:.4f} apart"
        )
    return 0


def _feed(batch: int, height: int, width: int) -> Feed:
    images = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
    return {"images": images, "sizes": np.tile(np.array([[height, width]]), (batch, 1))}


def _quantise(graph: Path, feed: Feed, output: Path, threads: int) -> None:
    proto = plain_graph(onnx.load(graph))
    layers = layers_of(proto)
    ranges = calibrate(proto, layers, [feed], plugins.onnxruntime_library(), threads)
    onnx.save(quantise(proto, layers, ranges), output)


def _session(path: Path, threads: int, profile: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if (library := plugins.onnxruntime_library()) is not None:
        options.register_custom_ops_library(str(library))
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile / "profile")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _times(graphs: dict[str, Path], feed: Feed, args: argparse.Namespace) -> None:
    batch = len(feed["images"])
    took: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(args.rounds):
        for name, path in graphs.items():  # one session at a time: the threads of a second one would spin beside it
            session = _session(path, args.threads)
            for run in range(WARM_UP + args.runs):
                started = time.perf_counter()
                session.run(None, dict(feed))
                if run >= WARM_UP:
                    took[name].append((time.perf_counter() - started) * 1e3 / batch)
            del session
    for name, times in took.items():
        print(f"{batch:>6}{name:>10}{statistics.median(times):>9.1f}{min(times):>9.1f}")
    exact, integers = took.values()
    medians, bests = statistics.median(exact) / statistics.median(integers), min(exact) / min(integers)
    print(f"{batch:>6}{'ratio':>10}{medians:>8.2f}x{bests:>8.2f}x")


def _profile(name: str, path: Path, feed: Feed, threads: int, folder: Path) -> None:
    """The operators that take most of the best of some runs of each node."""
    session = _session(path, threads, folder)
    for _ in range(6):
        session.run(None, dict(feed))
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes: dict[str, tuple[str, float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            kind, best = event["args"]["op_name"], nodes.get(event["name"], ("", float("inf")))[1]
            nodes[event["name"]] = (kind, min(best, event["dur"] / 1e3))
    kinds: Counter[str] = Counter()
    for kind, best in nodes.values():
        kinds[kind] += best  # type: ignore[assignment]
    total = sum(kinds.values())
    shares = ", ".join(f"{kind} {spent:.1f}" for kind, spent in kinds.most_common(SHOWN))
    print(f"\n{name}, ms by operator, one image, best of 6 each: {total:.1f} in all; {shares}")


if __name__ == "__main__":
    raise SystemExit(main())
