"""What TensorRT-RTX makes of each variant at full size: layers and types, seconds to parse and build, engine size.

Needs no GPU. Random weights; the graph is that of a checkpoint of the variant. With --models the traced graphs are kept
there and found again.

python -m benchmarks.tensorrt_layers --variants r50 --precisions fp32 fp16 --targets sm86 sm89
"""

import argparse
import gc
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from benchmarks.export_r50 import random_model
from benchmarks.machine import machine
from export.build import PLUGIN_LAYER, SAMPLE_LAYER, Engine, LayerReport, Profile, build, parse
from export.flavour import FLAVOURS, BuildError
from export.onnx_export import parse_canvases
from export.precision import to_half
from export.trace import trace
from models import VARIANTS

MATRIX_LAYERS = ("CONVOLUTION", "MATRIX_MULTIPLY")
SHORT = {"float": "f", "half": "h", "int64": "i64"}


@dataclass(frozen=True)
class Row:
    variant: str
    precision: str
    report: LayerReport
    parse_s: float
    build_s: float
    engine: Engine


def traced(variant: str, precision: str, folder: Path | None) -> onnx.ModelProto:
    """The variant's graph, made now or found in the folder."""
    path = None if folder is None else folder / f"{variant}-{precision}.onnx"
    if path is not None and path.exists():
        return onnx.load(path)
    model = random_model(variant)
    if precision == "fp16":
        to_half(model)
    graph = trace(model)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(graph, path)
    return graph


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """A row for each variant and precision, as soon as it is built."""
    profiles = [Profile(canvas, args.max_batch_size) for canvas in args.canvases]
    for variant in args.variants:
        for precision in args.precisions:
            graph = traced(variant, precision, args.models)
            started = time.perf_counter()
            parsed = parse(graph, FLAVOURS["rtx"])
            parsed_at = time.perf_counter()
            engine = build(parsed, profiles, args.targets)
            built_at = time.perf_counter()
            yield Row(variant, precision, parsed.report(), parsed_at - started, built_at - parsed_at, engine)
            del graph, parsed
            gc.collect()


def line(row: Row) -> str:
    """One line of the table."""
    report = row.report
    inputs = {" ".join(SHORT.get(name, name) for name in types) for types in report.plugin_inputs}
    matrices = [sum(report.count(kind, type_) for kind in MATRIX_LAYERS) for type_ in ("float", "half")]
    return (
        f"| {row.variant} | {row.precision} | {report.count(PLUGIN_LAYER)} | {' or '.join(sorted(inputs))} "
        f"| {report.count(SAMPLE_LAYER)} | {report.total} | {matrices[0]} / {matrices[1]} "
        f"| {row.parse_s:.1f} | {row.build_s:.1f} | {len(row.engine.content) / 2**20:.0f} |"
    )


def main() -> int:
    """Print the machine, and the table line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    add("--precisions", nargs="+", choices=("fp32", "fp16"), default=("fp32", "fp16"))
    add("--targets", nargs="+", default=("sm86", "sm89"), metavar="smNN")
    add("--canvases", type=parse_canvases, default=parse_canvases("800x1344"), metavar="HxW,...")
    add("--max-batch-size", type=int, default=8)
    add("--models", type=Path, metavar="DIR", help="keep traced graphs here")
    args = parser.parse_args()
    try:
        version = FLAVOURS["rtx"].load().__version__
        print(f"{machine()}; TensorRT-RTX {version}; {' and '.join(args.targets)} in one engine; ", end="")
        print(f"batches of 1 to {args.max_batch_size} on {', '.join(map(str, args.canvases))}\n")
        print("| variant | precision | plugin layers | their inputs | GridSample layers | layers ", end="")
        print("| convolutions and products, f / h | parse s | build s | engine MiB |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for row in measure(args):
            print(line(row), flush=True)
    except BuildError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 1
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
