"""`ddetr export --int8`: a bundle's graph in 8-bit integers for CPUs, kept only if AP on pictures with boxes holds."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

import plugins
from bundle import Bundle, BundleError, Manifest, QuantisedRecord, read_bundle, write_bundle
from bundle.reader import MANIFEST_FILE
from export.plain import PlainError, plain_graph
from export.quantise import Feed, QuantiseError, calibrate, groups_of, layers_of, open_session
from export.sensitivity import Refused, agreement, answers, choose
from parity.compare import Answer
from server.errors import ShapeUnsupported
from server.preprocess import lay_on_canvas, preprocess
from training.average_precision import AveragePrecision, Detection, average_precision
from training.coco import CocoSplit, DataError, Picture, read_pixels, read_split

INT8_FILE = "model-int8.onnx"
CALIBRATION, MEASURED = "train", "val"
PROBES = 16  # pictures that tell the groups apart
MAX_AP_DROP = 0.01

DESCRIPTION = """\
Put a graph in 8-bit integers beside a bundle's model.onnx, for CPUs with dot-product instructions (VNNI).

Ranges are taken from pictures of the training part of --data; AP, in float32 and in integers, is measured on its
validation part. Groups of layers that cost accuracy stay in float32. If AP falls all the same, nothing is written and
the exit status is 1. The pictures should be what the model will see: ranges fit no others."""

EXAMPLE = """\
example:
  ddetr export --int8 --data data/cells --bundle bundles/cells
  ddetr export --int8 --data data/cells --checkpoint best.safetensors --output bundles/cells"""


@dataclass
class _Measured:
    """AP and answers of one graph on the validation part."""

    ap: AveragePrecision
    answers: list[Answer] = field(repr=False)


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
    except (BundleError, DataError, PlainError, QuantiseError, Refused, ShapeUnsupported, OSError) as error:
        print(f"ddetr export: {error}", file=sys.stderr)
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
        default=64,
        metavar="N",
        help="most pictures to take ranges from (%(default)s)",
    )
    add("--max-ap-drop", type=float, default=MAX_AP_DROP, metavar="AP", help="most that AP may fall by (%(default)s)")
    add("--threads", type=int, default=0, metavar="N", help="threads to work with (default: one a core)")
    return parser


def quantise_bundle(
    bundle: Bundle,
    calibration: CocoSplit,
    measured: CocoSplit,
    output: Path,
    *,
    calibration_pictures: int = 64,
    max_ap_drop: float = MAX_AP_DROP,
    threads: int = 0,
) -> Bundle:
    """Publish `bundle` with its graph in integers in folder `output`; nothing is written before AP has held.

    Raises Refused where AP falls by more than `max_ap_drop`, DataError for pictures with other categories than the
    bundle's, and what reading pictures and bundles raises.
    """
    manifest = bundle.manifest
    for split in (calibration, measured):
        if missing := sorted(set(split.category_ids) - set(manifest.categories)):
            raise DataError(f"{split.annotations} has categories {missing}, which the bundle does not know")
    library = plugins.onnxruntime_library()
    started = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - started:7.1f} s  {line}", flush=True)

    proto = plain_graph(onnx.load(bundle.onnx_path))
    layers = layers_of(proto)
    if not layers:
        raise QuantiseError(f"{bundle.onnx_path} has no layer that this release knows; export it again")
    pictures = _spread(calibration.pictures, calibration_pictures)
    ranges = calibrate(proto, layers, _feeds(pictures, manifest), library, threads)
    say(f"ranges of {len(layers)} layers from {len(pictures)} pictures of {CALIBRATION}")

    def measure(graph: onnx.ModelProto, name: str) -> _Measured:
        found = list(answers(open_session(graph, library, threads), _feeds(measured.pictures, manifest)))
        ap = average_precision(measured.annotations, _detections(found, measured.pictures))
        say(f"{name} on {len(measured.pictures)} pictures of {MEASURED}: AP {ap.ap:.4f}, AP50 {ap.ap50:.4f}")
        return _Measured(ap, found)

    exact = measure(proto, "float32")
    tried: list[_Measured] = []

    def accept(graph: onnx.ModelProto) -> bool:
        tried.append(measure(graph, "integers"))
        return exact.ap.ap - tried[-1].ap.ap <= max_ap_drop

    try:
        probes = list(_feeds(pictures[:PROBES], manifest))
        choice = choose(proto, layers, ranges, probes, accept, library, threads, say)
    except Refused as error:
        best = max(tried, key=lambda one: one.ap.ap)
        raise Refused(
            f"refused: AP falls from {exact.ap.ap:.4f} to {best.ap.ap:.4f} on {len(measured.pictures)} pictures of "
            f"{measured.annotations}, more than {max_ap_drop:g}; {error}"
        ) from error
    got = tried[-1]
    agreed = agreement(exact.answers, got.answers)
    say(
        f"{agreed.matched:.2%} of {agreed.detections} detections matched, scores differ by "
        f"{agreed.score_difference:.4f} on average"
    )
    content = choice.proto.SerializeToString(deterministic=True)
    record = QuantisedRecord(
        file=INT8_FILE,
        sha256=hashlib.sha256(content).hexdigest(),
        of=manifest.hashes["onnx"],
        pictures=len(measured.pictures),
        ap_fp32=exact.ap.ap,
        ap_int8=got.ap.ap,
        ap50_fp32=exact.ap.ap50,
        ap50_int8=got.ap.ap50,
        agreement=agreed,
        calibration_pictures=len(pictures),
        float_groups=choice.float_groups,
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
    written = write_bundle(output, manifest.model_copy(update={"int8": record}), files)
    kept = f"; in float32: {', '.join(choice.float_groups)}" if choice.float_groups else ""
    say(f"{written.path / INT8_FILE}: {len(groups_of(layers)) - len(choice.float_groups)} groups in integers{kept}")
    return written


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
