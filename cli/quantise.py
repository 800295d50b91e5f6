"""`ddetr export --int8`: a bundle's graph in 8-bit integers for CPUs, kept only if AP on pictures with boxes holds."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

import plugins
from bundle import Bundle, BundleError, Manifest, QuantisedRecord, read_bundle, write_bundle
from bundle.reader import MANIFEST_FILE
from bundle.writer import check_place
from export.calibrate import CalibrationError, Feed, calibrate, is_of_onnxruntime, open_session
from export.plain import PlainError, plain_graph
from export.quantisable import groups_of, layers_of
from export.sensitivity import Refused, agreement, answers, choose
from export.trace import OUTPUTS
from parity import ProofInvalid, read_proof, run_gate
from parity.compare import Answer
from parity.gate import noise_of
from server.cores import available_cores, sums_bytes_exactly
from server.errors import ShapeUnsupported
from server.preprocess import lay_on_canvas, preprocess
from training.average_precision import AveragePrecision, Detection, average_precision
from training.coco import CocoSplit, DataError, Picture, read_pixels, read_split

INT8_FILE = "model-int8.onnx"
CALIBRATION, MEASURED = "train", "val"
PROBES = 16  # pictures that tell the groups apart
MAX_AP_DROP = 0.01
CALIBRATION_PICTURES = 64

EXPECTED = (
    BundleError,
    CalibrationError,
    DataError,
    PlainError,
    ProofInvalid,
    Refused,
    ShapeUnsupported,
    OSError,
    MemoryError,
)
"""What a user can meet and mend; so is what ONNX Runtime raises, which lacks memory or an operator."""

DESCRIPTION = """\
Put a graph in 8-bit integers beside a bundle's model.onnx, for CPUs with dot-product instructions (VNNI).

Ranges are taken from pictures of the training part of --data; AP, in float32 and in integers, is measured on its
validation part. Groups of layers that cost accuracy stay in float32. If AP falls all the same, no integers are written
(what --checkpoint has exported stays) and the exit status is 1. The pictures should be what the model will see: ranges
fit no others."""

EXAMPLE = """\
example:
  ddetr export --int8 --data data/cells --bundle bundles/cells
  ddetr export --int8 --data data/cells --checkpoint best.safetensors --output bundles/cells"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 after one line that says what went wrong."""
    parser = argument_parser()
    options, rest = parser.parse_known_args(argv)
    if options.data is None:
        parser.error(
            f"--int8 needs --data DIR: pictures of {CALIBRATION} to take the ranges from, and pictures of {MEASURED} "
            "with their boxes, on which AP must hold"
        )
    if (options.bundle is None) == (options.checkpoint is None):
        parser.error("name either --bundle, one that is there, or --checkpoint and --output, to export one first")
    if options.bundle is None and options.output is None:
        parser.error("--checkpoint needs --output, the bundle's folder")
    if options.calibration_pictures < 1:
        parser.error(f"--calibration-pictures is {options.calibration_pictures}; it must be at least 1")
    if options.threads < 1:
        parser.error(f"--threads is {options.threads}; it must be at least 1")
    if options.bundle is not None and rest:
        parser.error(f"with --bundle nothing is exported: what is {' '.join(rest)} for?")
    try:
        calibration, measured = (read_split(options.data, part) for part in (CALIBRATION, MEASURED))
        folder: Path = options.bundle or options.output
        if options.checkpoint is not None:
            from export.onnx_export import main as export_main  # it needs torch, a bundle does not

            status = export_main(["--checkpoint", str(options.checkpoint), "--output", str(folder), *rest])
            if status:
                return status
        quantise_bundle(
            read_bundle(folder),
            calibration,
            measured,
            options.output or folder,
            calibration_pictures=options.calibration_pictures,
            max_ap_drop=options.max_ap_drop,
            threads=options.threads,
        )
    except Exception as error:
        if not isinstance(error, EXPECTED) and not is_of_onnxruntime(error):
            raise
        said = " ".join(str(error).split()) or "memory does not suffice: end what else uses it"
        print(f"ddetr export: {said}", file=sys.stderr)
        return 1
    return 0


def argument_parser() -> argparse.ArgumentParser:
    """The flags beside those of an export."""
    parser = argparse.ArgumentParser(
        prog="ddetr export",
        usage="ddetr export --int8 --data DIR (--bundle DIR | --checkpoint FILE --output DIR [flags of ddetr export])",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--int8", action="store_true", help=argparse.SUPPRESS)
    add("--data", type=Path, metavar="DIR", help="COCO-format data: instances_train.json, instances_val.json, images/")
    add("--bundle", type=Path, metavar="DIR", help="the bundle to quantise")
    add("--checkpoint", type=Path, metavar="FILE", help="export this into --output first")
    add("--output", type=Path, metavar="DIR", help="the folder to write (default: that of --bundle)")
    add(
        "--calibration-pictures",
        type=int,
        default=CALIBRATION_PICTURES,
        metavar="N",
        help="most pictures to take ranges from (%(default)s)",
    )
    add("--max-ap-drop", type=float, default=MAX_AP_DROP, metavar="AP", help="most that AP may fall by (%(default)s)")
    add("--threads", type=int, default=available_cores(), metavar="N", help="to work with (default: %(default)s, all)")
    return parser


def quantise_bundle(
    bundle: Bundle,
    calibration: CocoSplit,
    measured: CocoSplit,
    output: Path,
    *,
    calibration_pictures: int = CALIBRATION_PICTURES,
    max_ap_drop: float = MAX_AP_DROP,
    threads: int = 1,
) -> Bundle:
    """Publish `bundle` with its graph in integers in folder `output`; nothing is written before AP has held.

    Raises Refused where AP falls by more than `max_ap_drop` or the bundle's own proof fails, DataError for pictures
    with other categories than the bundle's or without boxes, and what reading pictures and bundles raises.
    """
    for split in (calibration, measured):
        if missing := sorted(set(split.category_ids) - set(bundle.manifest.categories)):
            raise DataError(f"{split.annotations} has categories {missing}, which the bundle does not know")
    if not any(len(picture.boxes) for picture in measured.pictures):
        raise DataError(f"{measured.annotations} has no boxes to measure AP on")
    check_place(output)
    library = plugins.onnxruntime_library()
    say = _Clock()
    if not sums_bytes_exactly():
        say(
            "warning: this CPU has no VNNI, its 8-bit sums overflow: AP will be below that of a CPU that may serve this"
        )
    proto = plain_graph(onnx.load(bundle.onnx_path))
    layers = layers_of(proto)
    if not layers:
        raise PlainError(f"{bundle.onnx_path} has no layer that this release knows; export it again")
    pictures = _spread(calibration.pictures, calibration_pictures)
    ranges = calibrate(proto, layers, _feeds(pictures, bundle.manifest), library, threads)
    say(f"ranges of {len(layers)} layers from {len(pictures)} pictures of {CALIBRATION}")

    judge = _Judge(bundle, measured, max_ap_drop, library, threads, say)
    judge.measure(proto, "float32")
    try:
        probes = list(_feeds(_spread(pictures, PROBES), bundle.manifest))
        choice = choose(proto, layers, ranges, probes, judge.accepts, library, threads, say)
    except Refused as error:
        raise Refused(f"refused: {judge.complaint()}; {error}") from error
    exact, got = judge.found[0], judge.found[-1]
    agreed = agreement(exact.answers, got.answers)
    say(f"{agreed.matched:.2%} of {agreed.detections} detections found, scores {agreed.score_difference:.4f} apart")
    content = choice.proto.SerializeToString(deterministic=True)
    record = QuantisedRecord(
        file=INT8_FILE,
        sha256=hashlib.sha256(content).hexdigest(),
        of=bundle.manifest.hashes["onnx"],
        pictures=len(measured.pictures),
        ap_fp32=exact.ap.ap,
        ap_int8=got.ap.ap,
        ap50_fp32=exact.ap.ap50,
        ap50_int8=got.ap.ap50,
        agreement=agreed,
        calibration_pictures=len(pictures),
        float_groups=choice.float_groups,
        noise=got.noise,
        built_with={
            "onnx": importlib.metadata.version("onnx"),
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
    )
    files: dict[str, Path | bytes] = {
        path.name: path for path in sorted(bundle.path.iterdir()) if path.is_file() and path.name != MANIFEST_FILE
    }
    files[INT8_FILE] = content
    written = write_bundle(output, bundle.manifest.model_copy(update={"int8": record}), files)
    kept = f"; in float32: {', '.join(choice.float_groups)}" if choice.float_groups else ""
    say(f"{written.path / INT8_FILE}: {len(groups_of(layers)) - len(choice.float_groups)} groups in integers{kept}")
    return written


class _Clock:
    """Says lines, each with the seconds since the first step began."""

    def __init__(self) -> None:
        self._started_s = time.perf_counter()

    def __call__(self, line: str) -> None:
        print(f"{time.perf_counter() - self._started_s:7.1f} s  {line}", flush=True)


@dataclass(frozen=True)
class _Measured:
    """AP and answers of one graph on the measured pictures, and what the bundle's proof says against it.

    noise: how far its answers to the proof's pictures are from float32's, by the figures that limits follow.
    """

    ap: AveragePrecision
    answers: list[Answer]
    failures: tuple[str, ...] = ()
    noise: dict[str, float] = field(default_factory=dict)


class _Judge:
    """Measures graphs on pictures with boxes; the first is the one that the others are held against."""

    def __init__(
        self,
        bundle: Bundle,
        split: CocoSplit,
        max_ap_drop: float,
        library: Path | None,
        threads: int,
        say: Callable[[str], None],
    ) -> None:
        self.found: list[_Measured] = []
        self._bundle, self._split, self._max_ap_drop = bundle, split, max_ap_drop
        self._library, self._threads, self._say = library, threads, say
        self._proof = read_proof(bundle)

    def measure(self, graph: onnx.ModelProto, name: str) -> _Measured:
        """Put the graph's figures at the end of `found`."""
        pictures = self._split.pictures
        session = open_session(graph, self._library, self._threads)
        given = answers(session, _feeds(pictures, self._bundle.manifest))
        ap = average_precision(self._split.annotations, _detections(given, pictures))
        self._say(f"{name} on {len(pictures)} pictures of {MEASURED}: AP {ap.ap:.4f}, AP50 {ap.ap50:.4f}")
        found = _Measured(ap, given, *(self._proven(session) if self.found else ()))
        self.found.append(found)
        return found

    def accepts(self, graph: onnx.ModelProto) -> bool:
        """Whether AP holds, and a server would take it."""
        measured = self.measure(graph, "integers")
        return self._drop(measured) <= self._max_ap_drop and not measured.failures

    def complaint(self) -> str:
        """What is wrong with the best that was measured."""
        exact, *rest = self.found
        best = max(rest, key=lambda one: (not one.failures, one.ap.ap))
        if self._drop(best) > self._max_ap_drop:
            return (
                f"AP is {best.ap.ap:.4f} in integers, {exact.ap.ap:.4f} in float32, on {len(self._split.pictures)} "
                f"pictures of {self._split.annotations}: more than {self._max_ap_drop:g} lost"
            )
        return f"the bundle's proof fails: {best.failures[0]}"

    def _drop(self, measured: _Measured) -> float:
        return self.found[0].ap.ap - measured.ap.ap

    def _proven(self, session: onnxruntime.InferenceSession) -> tuple[tuple[str, ...], dict[str, float]]:
        """What the bundle's proof says against the graph, and the noise that a server's gate will allow it."""
        if self._proof is None:
            return (), {}

        def infer(images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> Sequence[Any]:
            found: Sequence[Any] = session.run(list(OUTPUTS), {"images": images, "sizes": sizes})
            return found

        report = run_gate(infer, replace(self._proof, integers={}), "int8", [1])  # not held to a graph of before
        self._say(f"the bundle's proof: {'passed' if report.passed else report.failures[0]}")
        return report.failures, noise_of(report)


def _spread(pictures: Sequence[Picture], most: int) -> list[Picture]:
    """At most so many of them, evenly over the whole part: neighbours in a list are often alike."""
    step = max(1.0, len(pictures) / max(1, most))
    return [pictures[int(index * step)] for index in range(min(len(pictures), max(1, most)))]


def _feeds(pictures: Sequence[Picture], manifest: Manifest) -> Iterator[Feed]:
    """Each picture alone, resized and laid on its canvas as a server does it."""
    for picture in pictures:
        pixels, canvas = preprocess(read_pixels(picture), manifest)
        images, sizes = lay_on_canvas([pixels], canvas)
        yield {"images": images, "sizes": sizes}


def _detections(found: Sequence[Answer], pictures: Sequence[Picture]) -> list[Detection]:
    """In COCO's result format, boxes clipped to their picture."""
    detections: list[Detection] = []
    for answer, picture in zip(found, pictures, strict=True):
        side = np.array([picture.width, picture.height] * 2, np.float32)
        boxes = (answer.boxes * side).clip(0, side)
        boxes[:, 2:] -= boxes[:, :2]
        detections += [
            {"image_id": picture.image_id, "category_id": label, "bbox": box, "score": score}
            for box, score, label in zip(boxes.tolist(), answer.scores.tolist(), answer.labels.tolist(), strict=True)
        ]
    return detections
