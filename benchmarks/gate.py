"""What the parity gate catches, and by which figure: `python -m benchmarks.gate`, of the embedded model."""

import argparse
import copy
import time
from collections.abc import Sequence

import onnx

import plugins
from benchmarks.corruptions import CORRUPTIONS, run
from benchmarks.machine import machine
from bundle import embedded_bundle, read_bundle
from export.precision import to_half
from export.trace import trace
from models import DeformableDetr, load_checkpoint
from parity import GateReport, read_proof, run_gate

BATCH_SIZES = (1, 3)


def graphs(model: DeformableDetr) -> dict[str, onnx.ModelProto]:
    """Precision to the graph that an engine of it is built of."""
    half = copy.deepcopy(model)
    to_half(half)
    return {"fp32": trace(model), "fp16": trace(half)}


def caught(report: GateReport) -> str:
    """The figure that failed most often, as it was found first; and how many other figures failed."""
    if report.passed:
        return "passed"
    figures = list(report.caught_by)
    line = next(line for line in report.failures if line.split(": ")[1] == figures[0])
    said = line.split(": ", 1)[1].replace(" detections without a partner", "").replace(" of one picture", "")
    return f"{said:.78}" + (f" (+{len(figures) - 1})" if len(figures) > 1 else "")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table: each corruption at either precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all-canvases", action="store_true", help="not only the first")
    options = parser.parse_args(argv)
    bundle = read_bundle(embedded_bundle())
    proof = read_proof(bundle)
    if proof is None or bundle.checkpoint_path is None:
        parser.exit(1, "the embedded bundle has no proof or no checkpoint\n")
    print(machine())
    protos = graphs(load_checkpoint(bundle.checkpoint_path))
    library = plugins.onnxruntime_library()
    canvases = bundle.manifest.canvases if options.all_canvases else bundle.manifest.canvases[:1]
    print(f"{'':50} {'at fp32':84} at fp16")
    for name, there in (("right, native kernel", library), ("right, the op's function", None)):
        cells = []
        for precision, proto in protos.items():
            report = run_gate(run(proto, there), proof, precision, BATCH_SIZES, canvases)
            cells.append(f"{caught(report)}, {len(report.rows)} answers in {report.seconds:.1f} s")
        print(f"{name:50} {cells[0]:84} {cells[1]}", flush=True)
    missed = 0
    for corruption in CORRUPTIONS:
        reports = [
            run_gate(corruption.engine(proto, library), proof, precision, BATCH_SIZES, canvases)
            for precision, proto in protos.items()
        ]
        missed += sum(report.passed for report in reports)
        print(f"{corruption.name:50} {caught(reports[0]):84} {caught(reports[1])}", flush=True)
    print(f"{len(CORRUPTIONS)} corruptions at 2 precisions, {missed} not caught")


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s in all")
