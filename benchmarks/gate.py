"""What the parity gate catches, and by which figure: of the embedded model, or of a bundle that has integers, too.

python -m benchmarks.gate
ddetr export --int8 --data DIR --bundle models/blood-cells --output runs/int8
python -m benchmarks.gate --bundle runs/int8
"""

import argparse
import copy
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx

import plugins
from benchmarks.corruptions import CORRUPTIONS, run
from benchmarks.machine import machine
from bundle import Bundle, embedded_bundle, read_bundle
from export.precision import to_half
from export.trace import trace
from models import load_checkpoint
from parity import GateReport, Infer, read_proof, run_gate
from parity.limits import MEASURED

BATCH_SIZES = (1, 3)
WIDTH = 88


def graphs(bundle: Bundle) -> dict[str, onnx.ModelProto]:
    """Precision to the graph that an engine of it is built of or runs. Raises ValueError for want of the checkpoint."""
    if bundle.checkpoint_path is None:
        raise ValueError(f"{bundle.path} carries no checkpoint to trace in either precision")
    model = load_checkpoint(bundle.checkpoint_path)
    half = copy.deepcopy(model)
    to_half(half)
    found = {"fp32": trace(model), "fp16": trace(half)}
    return found if bundle.int8_path is None else {**found, "int8": onnx.load(bundle.int8_path)}


def caught(report: GateReport) -> str:
    """The figure that failed most often, as it was found first; and how many other figures failed."""
    if report.passed:
        nearest = {name: max(getattr(row.figures, name) for row in report.rows) for name in (*MEASURED, "signature")}
        return "passed; worst " + ", ".join(f"{name} {value:.1e}" for name, value in nearest.items())
    figures = list(report.caught_by)
    line = next(line for line in report.failures if line.split(": ")[1] == figures[0])
    said = line.split(": ", 1)[1].replace(" detections without a partner", "").replace(" of one picture", "")
    return f"{said:.78}" + (f" (+{len(figures) - 1})" if len(figures) > 1 else "")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table: each corruption in each precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=embedded_bundle(), help="default: the embedded one")
    parser.add_argument("--all-canvases", action="store_true", help="not only the first")
    options = parser.parse_args(argv)
    bundle = read_bundle(options.bundle)
    proof = read_proof(bundle)
    if proof is None:
        parser.exit(1, f"{bundle.path} has no proof\n")
    print(machine())
    protos = graphs(bundle)
    library = plugins.onnxruntime_library()
    canvases = bundle.manifest.canvases if options.all_canvases else bundle.manifest.canvases[:1]

    def row(name: str, engines: Iterable[tuple[str, Infer]]) -> list[GateReport]:
        reports = [run_gate(engine, proof, precision, BATCH_SIZES, canvases) for precision, engine in engines]
        print(f"{name:50}" + "".join(f"{caught(report):{WIDTH}}" for report in reports), flush=True)
        return reports

    print(f"{'':50}" + "".join(f"at {precision:{WIDTH - 3}}" for precision in protos))
    for name, there in (("right, native kernel", library), ("right, the op's function", None)):
        row(name, ((precision, run(proto, there)) for precision, proto in protos.items()))
    missed: Counter[str] = Counter()
    for corruption in CORRUPTIONS:
        reports = row(corruption.name, ((name, corruption.engine(proto, library)) for name, proto in protos.items()))
        missed.update(precision for precision, report in zip(protos, reports, strict=True) if report.passed)
    said = ", ".join(f"{missed[precision]} in {precision}" for precision in protos)
    print(f"of {len(CORRUPTIONS)} corruptions not caught: {said}")


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s in all")
