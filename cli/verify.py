"""`ddetr verify`: every engine that this machine can run, held against the bundle's proof, and against data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import orjson
from numpy.typing import NDArray

from bundle import Bundle, BundleError, Canvas, EngineRecord, read_bundle
from cli.handover import say_missing_extra
from cli.verify_page import page
from parity import GateReport, Infer, Proof, ProofInvalid, read_proof, run_gate
from parity.limits import AP_LOSS
from parity.report import document, table
from server.cores import available_cores
from server.engine import Candidate, run_engine, ways_to_run
from server.errors import StartupError
from server.settings import Settings

if TYPE_CHECKING:
    from cli.verify_data import Comparison

PASSED, FAILED, CANNOT_RUN = 0, 1, 2
ENGINES = ("all", "tensorrt", "onnxruntime", "function")
BATCH_SIZES = (1, 3)

DESCRIPTION = """\
Hold a bundle's engines against its proof: pictures drawn from seeds, and what float32 PyTorch says to them.

Every engine that this machine can run is tried: TensorRT, ONNX Runtime, and ONNX Runtime with the op as the function
that the file carries (`function`). With --data also AP on photographs is compared.

exit status: 0 all that this machine can run passed; 1 one failed, or one that is for this machine could not be opened
or does not take the batch sizes asked for (leave it out with --engine); 2 nothing could be compared,
or the report could not be written."""

EXAMPLE = """\
example:
  ddetr verify bundles/r50
  ddetr verify bundles/r50 --engine tensorrt --format html --output report.html
  ddetr verify bundles/cells --data data/bccd --format json
"""


class CannotVerify(Exception):
    """Nothing can be compared; the message says why, and the way out."""


@dataclass(frozen=True)
class Way:
    """An engine to try. `open` raises StartupError; what it opens is asked, then closed."""

    name: str
    precision: str
    batch_sizes: tuple[int, ...]
    open: Callable[[], Opened]


@dataclass(frozen=True)
class Opened:
    """An engine that is open."""

    infer: Infer
    close: Callable[[], None]


@dataclass(frozen=True, eq=False)
class Verdict:
    """One engine: its report, or why there is none; and the AP of both sides (reference's, engine's) on data.

    owed: there is no report, and there should be: the engine is for this machine.
    """

    name: str
    precision: str
    report: GateReport | None
    why: str = ""
    ap: tuple[float, float] | None = None
    owed: bool = False

    @property
    def ap_fell(self) -> bool:
        """By more than its precision may cost."""
        return self.ap is not None and self.ap[0] - self.ap[1] > AP_LOSS[self.precision]

    @property
    def passed(self) -> bool:
        """Run, and right."""
        return self.report is not None and self.report.passed and not self.ap_fell

    @property
    def failed(self) -> bool:
        """Run, and wrong."""
        return self.report is not None and not self.passed

    @property
    def word(self) -> str:
        """For people."""
        return "passed" if self.passed else "FAILED" if self.failed else "CANNOT" if self.owed else "not run"

    def headline(self) -> str:
        """In one line: which engine, how it went, and why or by what."""
        said = f"{self.word:8} {self.name}"
        if self.report is None:
            return f"{said}: {self.why}"
        said += f", {self.precision}: {len(self.report.rows)} answers in {self.report.seconds:.1f} s"
        if self.report.caught_by:
            said += f"; caught by {', '.join(self.report.caught_by)}"
        if self.ap is not None:
            said += f"; AP {self.ap[1]:.4f}, reference {self.ap[0]:.4f}"
            said += f", may fall by {AP_LOSS[self.precision]:g}" if self.ap_fell else ""
        return said


def run(argv: Sequence[str]) -> int:
    """Verify one bundle; the exit status says how it went."""
    parser = argument_parser()
    arguments = parser.parse_args(argv)
    if arguments.output is not None and not arguments.output.resolve().parent.is_dir():
        parser.error(f"--output: {arguments.output.resolve().parent} is not a folder")
    try:
        bundle = read_bundle(arguments.bundle)
        proof = read_proof(bundle)
        if proof is None:
            raise CannotVerify(f"{bundle.path} carries no proof; export its checkpoint again: ddetr export")
        data = None if arguments.data is None else comparison_on(arguments.data, arguments.split, bundle)
        verdicts = verify(bundle, proof, arguments, data)
    except ModuleNotFoundError as error:
        if arguments.data is None:
            raise
        say_missing_extra("verify --data", "train", (error.name or "").partition(".")[0])
        return CANNOT_RUN
    except (BundleError, ProofInvalid, CannotVerify, StartupError, OSError, ValueError) as error:
        print(f"ddetr verify: {error}", file=sys.stderr)
        return CANNOT_RUN
    content = rendered(arguments.format, bundle, proof, verdicts)
    right = PASSED
    if arguments.output is None:
        sys.stdout.write(content)
    else:
        try:
            arguments.output.write_text(content, encoding="utf-8")
        except OSError as error:
            print(f"ddetr verify: the report cannot be written: {error}", file=sys.stderr)
            right = CANNOT_RUN
    if not any(verdict.report for verdict in verdicts):
        print("ddetr verify: no engine could be run", file=sys.stderr)
        return CANNOT_RUN
    owed = [verdict for verdict in verdicts if verdict.owed]
    for verdict in owed:
        print(f"ddetr verify: not compared: {verdict.name}: {verdict.why}", file=sys.stderr)
    return FAILED if owed or any(verdict.failed for verdict in verdicts) else right


def argument_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="ddetr verify",
        usage="ddetr verify BUNDLE [flags]",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    add("--engine", choices=ENGINES, default="all", help="default %(default)s")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--batch-sizes", type=_sizes, metavar="N,...", help="default: 1,3, for TensorRT its engine's own")
    add("--canvases", metavar="HxW,...", help="only these (default: all of the bundle)")
    add("--data", type=Path, metavar="DIR", help="COCO-format data: compare AP, too")
    add("--split", default="val", help="of the data (default: %(default)s)")
    add("--format", choices=("table", "json", "html"), default="table", help="default %(default)s")
    add("--output", type=Path, metavar="FILE", help="write the report here (default: standard output)")
    return parser


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) if part.strip().isdecimal() else 0 for part in text.split(","))
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of batch sizes such as 1,4,8")
    return sizes


def comparison_on(data: Path, split: str, bundle: Bundle) -> Comparison:
    """What `cli.verify_data` does; imported late, as it needs the train extra."""
    from cli.verify_data import Comparison

    return Comparison(data, split, bundle)


def verify(bundle: Bundle, proof: Proof, arguments: argparse.Namespace, data: Comparison | None) -> list[Verdict]:
    """A verdict for each engine asked for."""
    verdicts = []
    canvases = canvases_named(arguments.canvases, bundle)
    for way in ways(bundle, arguments.engine, arguments.device, arguments.batch_sizes):
        if isinstance(way, Verdict):
            verdicts.append(way)
            continue
        try:
            opened = way.open()
        except StartupError as error:
            verdicts.append(Verdict(way.name, way.precision, None, str(error), owed=True))
            continue
        try:
            report = run_gate(opened.infer, proof, way.precision, way.batch_sizes, canvases, _say(way.name))
            answers = data is not None and not any(row.figures.faults for row in report.rows) and bool(report.rows)
            ap = (data.reference(), data.average_precision(opened.infer)) if data is not None and answers else None
        finally:
            opened.close()
        verdicts.append(Verdict(way.name, way.precision, report, ap=ap))
    return verdicts


def canvases_named(names: str | None, bundle: Bundle) -> list[Canvas]:
    """The bundle's canvases of these names, "800x1344,960x960". Raises CannotVerify naming one that it has not."""
    there = {str(canvas): canvas for canvas in bundle.manifest.canvases}
    wanted = list(there) if names is None else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in there:
            raise CannotVerify(f"{bundle.path} has no canvas {name!r}; it has {', '.join(there)}")
    return [there[name] for name in wanted]


def ways(bundle: Bundle, asked: str, device: str, sizes: tuple[int, ...] | None) -> Iterator[Way | Verdict]:
    """The engines there are, best first; a verdict without a report for a kind that cannot be run here, and why."""
    profiles = [profile for engine in bundle.manifest.engines for profile in engine.profiles]
    largest = min((profile.max_batch_size for profile in profiles), default=max(BATCH_SIZES))
    typical = {profile.typical_batch_size for profile in profiles if profile.typical_batch_size <= largest}
    settings = Settings(
        bundle=bundle.path, device=device, engine_instances=1, max_batch_size=largest, build_engine="never"
    )
    kinds: list[tuple[str, str, tuple[int, ...]]] = []
    if asked in ("all", "tensorrt"):
        kinds.append(("tensorrt", "auto", sizes or tuple(sorted({1, largest, *typical}))))
    if asked in ("all", "onnxruntime"):
        kinds.append(("onnxruntime", "fp32", sizes or BATCH_SIZES))
        if bundle.int8_path is not None:
            kinds.append(("onnxruntime", "int8", sizes or BATCH_SIZES))
    for engine, precision, batch_sizes in kinds:
        found = ways_to_run(settings.model_copy(update={"engine": engine, "precision": precision}), bundle)
        runs = any(isinstance(way, Candidate) for way in found)
        for way in found:
            built = next((record for record in bundle.manifest.engines if record.file in way.name.split()), None)
            if isinstance(way, Candidate):
                if built is not None and (why := _beyond(built, batch_sizes)):
                    yield Verdict(way.name, way.precision, None, why, owed=True)
                else:
                    yield Way(way.name, way.precision, batch_sizes, partial(_open, way))
            elif built is not None or not runs:
                yield Verdict(way.name, "" if precision == "auto" else precision, None, way.why, owed=built is not None)
    if asked in ("all", "function"):
        yield Way(
            "onnxruntime on cpu, the op's function", "fp32", sizes or BATCH_SIZES, partial(_open_function, bundle)
        )


def _beyond(record: EngineRecord, batch_sizes: Sequence[int]) -> str:
    """Why the engine cannot be asked in these sizes; empty where it can."""
    most = min((profile.max_batch_size for profile in record.profiles), default=max(batch_sizes))
    if max(batch_sizes) <= most:
        return ""
    return (
        f"it is built for at most {most} images at once, and --batch-sizes asks for {max(batch_sizes)}: leave that "
        f"out, or build it with --max-batch-size {max(batch_sizes)}"
    )


def _open(candidate: Candidate) -> Opened:
    """An engine of the server."""
    engine = candidate.open()

    def infer(images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> Sequence[NDArray[Any]]:
        canvas = Canvas(height=images.shape[1], width=images.shape[2])
        filled = [image[:height, :width] for image, (height, width) in zip(images, sizes.tolist(), strict=True)]
        raw = run_engine(engine, filled, canvas)
        return raw.boxes, raw.scores, raw.labels

    return Opened(infer, engine.close)


def _open_function(bundle: Bundle) -> Opened:
    """ONNX Runtime as it is on a machine without our libraries."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = available_cores()
    try:
        session = onnxruntime.InferenceSession(bundle.onnx_path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise StartupError(f"ONNX Runtime cannot load {bundle.onnx_path}: {error}") from error
    outputs = ["boxes", "scores", "labels"]
    return Opened(lambda images, sizes: session.run(outputs, {"images": images, "sizes": sizes}), lambda: None)


def _say(name: str) -> Callable[[str], None] | None:
    """Progress on a terminal's stderr, and nowhere else."""
    return (lambda line: print(f"{name}: {line}", file=sys.stderr)) if sys.stderr.isatty() else None


def rendered(form: str, bundle: Bundle, proof: Proof, verdicts: Sequence[Verdict]) -> str:
    """The report in the form "table", "json" or "html"."""
    model = bundle.manifest.model
    if form == "html":
        return page(bundle, proof, verdicts)
    if form == "json":
        content = {
            "bundle": str(bundle.path),
            "model": {"name": model.name, "version": model.version},
            "passed": not any(verdict.failed or verdict.owed for verdict in verdicts)
            and any(verdict.passed for verdict in verdicts),
            "engines": [
                {
                    "engine": verdict.name,
                    "verdict": verdict.word,
                    "why": verdict.why,
                    "ap": None if verdict.ap is None else {"reference": verdict.ap[0], "engine": verdict.ap[1]},
                    **({"precision": verdict.precision} if verdict.report is None else document(verdict.report)),
                    "passed": verdict.passed,
                }
                for verdict in verdicts
            ],
        }
        return orjson.dumps(content, option=orjson.OPT_INDENT_2).decode() + "\n"
    lines = [f"{model.name} {model.version}, {bundle.path}"]
    for verdict in verdicts:
        lines += ["", verdict.headline()]
        if verdict.report is not None:
            lines.append(table(verdict.report))
    return "\n".join(lines) + "\n"
