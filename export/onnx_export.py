"""`python -m export.onnx_export`: a checkpoint into a bundle that ONNX Runtime serves."""

import argparse
import importlib.metadata
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import onnx

from bundle import (
    Bundle,
    BundleError,
    Canvas,
    CanvasError,
    Manifest,
    ModelName,
    ParityRecord,
    ResizeRule,
    canvases_for,
    choose_canvas,
    resized_size,
    write_bundle,
)
from bundle.reader import CHECKPOINT_FILE, ONNX_FILE, PROOF_FILE, sha256_of
from bundle.writer import check_place
from export import op
from export.build_errors import is_no_memory
from export.calibrate import is_of_onnxruntime
from export.malloc import keep_freed_memory
from export.proof import check_proof, make_proof
from export.pyramid import pyramid_pixels
from export.trace import TraceError, trace
from export.verify import MAX_BOX_ERROR, MAX_SCORE_ERROR, ParityError, verify
from models import VARIANTS, CheckpointError, DeformableDetr, DeformableDetrConfig, load_checkpoint, save_checkpoint
from parity.proof import proof_bytes

# What two networks of one variant may differ in.
_NOT_STRUCTURE = {
    "backbone_norm", "dropout", "num_classes", "num_queries", "category_ids", "category_names",
    "resize_shortest", "resize_longest", "pixel_mean", "pixel_std",
}  # fmt: skip
_ROW = ("num_feature_levels", "with_box_refine", "two_stage", "dilation")
_ASPECT_RATIOS = (1 / 2, 3 / 4, 1, 4 / 3, 2)  # height to width of pictures that a server is sure to get
_PROGRAMS = ("torch", "onnx", "onnxscript", "onnxruntime")

Say = Callable[[str], None]


class ExportError(ValueError):
    """What was asked for cannot be exported; the message names the value."""


@dataclass(frozen=True)
class Request:
    """What to export, and under which name. `canvases` empty: those that the resize rule needs."""

    checkpoint: Path
    output: Path
    variant: str | None = None
    name: str | None = None
    model_version: str = "1"
    canvases: tuple[Canvas, ...] = ()
    with_checkpoint: bool = False
    attach: tuple[Path, ...] = ()  # files to put beside the model: a model card, its pictures
    replace: bool = False  # a bundle that holds more than an export makes


def export(request: Request, say: Say = lambda _: None) -> Bundle:
    """load -> trace -> verify -> prove -> publish. Until the last step nothing is written to the output.

    Raises what the steps raise: FileNotFoundError, CheckpointError, ExportError, TraceError, ParityError, BundleError.
    """
    check_place(request.output)
    if not request.replace and (lost := _made_by_others(request.output)):
        raise ExportError(
            f"{request.output} holds {', '.join(lost)}, which an export does not make again: "
            "give another --output, or --replace it"
        )
    for path in request.attach:
        if not path.is_file():
            raise ExportError(f"{path}, to be put beside the model, does not exist")
    step = _Steps(say)
    with step("load"):
        model = load_checkpoint(request.checkpoint, request.variant)
    canvases = request.canvases or canvases_for(_rule(model.config))
    _check_canvases(canvases, model.config, say)
    with step("trace"):
        proto = trace(model, for_cpu=True)
        content = proto.SerializeToString(deterministic=True)
    types = [node.op_type for node in proto.graph.node if node.domain == op.DOMAIN]
    say(
        f"         {len(proto.graph.node)} nodes, {types.count(op.NAME)} of them {op.NAME} and "
        f"{len(types) - types.count(op.NAME)} other layers of the native library; {len(content) / 2**20:.1f} MiB"
    )
    with step("verify"):
        parity = verify(model, proto, _two_of(canvases), _table(say))
    with step("prove"):
        proof = make_proof(model, canvases, max_detections_of(proto), lambda line: say(f"         {line}"))
        check_proof(proof, proto)
    with step("publish"), tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / CHECKPOINT_FILE
        save_checkpoint(model, checkpoint)
        manifest = _manifest(request, model, proto, canvases, parity, checkpoint_hash=sha256_of(checkpoint))
        files: dict[str, Path | bytes] = {path.name: path for path in request.attach}
        files[ONNX_FILE] = content
        files[PROOF_FILE] = proof_bytes(proof)
        if request.with_checkpoint:
            files[CHECKPOINT_FILE] = checkpoint
        written = write_bundle(request.output, manifest, files)
    say(f"         {written.path}: {manifest.model.name} {manifest.model.version}, {manifest.variant}")
    return written


def _made_by_others(output: Path) -> list[str]:
    """What a bundle in `output` has beside the graph: engines, the graph in integers."""
    return sorted(path.name for pattern in ("*.engine", "*-int8.onnx") for path in output.glob(pattern))


class _Steps:
    """Says the name of each step and the seconds it took."""

    def __init__(self, say: Say) -> None:
        self._say = say

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._say(f"{name:8} {time.perf_counter() - started:6.1f} s")


def _rule(config: DeformableDetrConfig) -> ResizeRule:
    return ResizeRule(shortest=config.resize_shortest, longest=config.resize_longest)


def _check_canvases(canvases: Sequence[Canvas], config: DeformableDetrConfig, say: Say) -> None:
    """Raise ExportError for a canvas too small for the queries; say which common pictures no canvas holds."""
    for canvas in canvases:
        if config.two_stage and (pixels := pyramid_pixels(canvas, config)) < config.num_queries:
            raise ExportError(
                f"canvas {canvas} has {pixels} pixels on all levels, fewer than {config.num_queries} queries"
            )
    rule = _rule(config)
    for ratio in _ASPECT_RATIOS:
        height, width = resized_size(round(1000 * ratio), 1000, rule)
        try:
            choose_canvas(height, width, canvases)
        except CanvasError as error:
            say(f"warning: a picture {ratio:g} times as high as wide cannot be served: {error}")


def _two_of(canvases: Sequence[Canvas]) -> tuple[Canvas, Canvas]:
    """The two canvases to verify on: of the largest one and the first of another shape, or one made up beside it."""
    largest = max(canvases, key=lambda canvas: canvas.height * canvas.width)
    others = [canvas for canvas in canvases if canvas != largest]
    return (others[0] if others else Canvas(height=largest.height + 32, width=largest.width), largest)


def _manifest(
    request: Request,
    model: DeformableDetr,
    proto: onnx.ModelProto,
    canvases: tuple[Canvas, ...],
    parity: tuple[ParityRecord, ...],
    checkpoint_hash: str,
) -> Manifest:
    config = model.config
    variant = variant_of(config)
    ids = config.category_ids or tuple(range(config.num_classes))
    names = config.category_names or tuple(f"class {index}" for index in range(config.num_classes))
    built_with = {program: importlib.metadata.version(program) for program in _PROGRAMS}
    return Manifest(
        model=ModelName(name=request.name or variant, version=request.model_version),
        variant=variant,
        categories=dict(zip(ids, names, strict=True)),
        resize=_rule(config),
        canvases=canvases,
        mean=config.pixel_mean,
        std=config.pixel_std,
        max_detections=max_detections_of(proto),
        hashes={"checkpoint": checkpoint_hash},
        built_with={**built_with, "python": platform.python_version()},
        parity=parity,
    )


def max_detections_of(proto: onnx.ModelProto) -> int:
    """K of a served graph."""
    scores = next(value for value in proto.graph.output if value.name == "scores")
    return int(scores.type.tensor_type.shape.dim[1].dim_value)


def variant_of(config: DeformableDetrConfig) -> str:
    """The row of the paper's table the network is, else "custom-" and the row it is like, without its backbone."""
    structure = [field.name for field in fields(config) if field.name not in _NOT_STRUCTURE]
    for name, row in VARIANTS.items():
        if all(getattr(config, field) == getattr(row, field) for field in structure):
            return name
    for name, row in VARIANTS.items():
        levels = (config.num_feature_levels > 1) == (row.num_feature_levels > 1)
        if levels and all(getattr(config, field) == getattr(row, field) for field in _ROW[1:]):
            return "custom-" + (name.removeprefix("r50-") if name != "r50" else "multi-scale")
    return "custom"


def _table(say: Say) -> Callable[[ParityRecord], None]:
    """A line of the parity table for each record, under its heading."""
    say("         canvas      batch   box error   score error   detections   engine")
    say(f"         limit               {MAX_BOX_ERROR:9.1e}     {MAX_SCORE_ERROR:9.1e}")

    def line(record: ParityRecord) -> None:
        say(
            f"         {record.canvas!s:10} {record.batch_size:6}   {record.max_box_error:9.1e}"
            f"     {record.max_score_error:9.1e}   {record.detections_compared:10}   {record.engine}"
        )

    return line


def parse_canvases(text: str) -> tuple[Canvas, ...]:
    """ "800x1088,1088x800" -> canvases (height x width). Raises argparse.ArgumentTypeError naming the part."""
    canvases = []
    for part in text.split(","):
        sides = part.strip().lower().split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise argparse.ArgumentTypeError(f"{part.strip()!r} is not HEIGHTxWIDTH in pixels, such as 800x1088")
        canvases.append(Canvas(height=int(sides[0]), width=int(sides[1])))
    return tuple(dict.fromkeys(canvases))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn a checkpoint into a bundle: load, trace to ONNX, verify against PyTorch, publish.",
        epilog="example: ddetr export --checkpoint r50_deformable_detr-checkpoint.pth --output bundles/r50; "
        "8-bit integers for CPUs: ddetr export --int8 --help",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FILE",
        help="an official .pth, a Hugging Face folder, or a .safetensors of this project")  # fmt: skip
    add("--output", type=Path, required=True, metavar="DIR", help="the bundle's folder; a bundle there is replaced")
    add("--replace", action="store_true", help="replace even a bundle with engines, or with a graph in integers")
    add("--variant", choices=tuple(VARIANTS), help="needed only where the checkpoint does not tell dilation")
    add("--name", help="the model's name (default: its variant)")
    add("--model-version", default="1", metavar="TEXT", help="the model's version (default %(default)s)")
    add("--canvases", type=parse_canvases, default=(), metavar="HxW,...",
        help="input sizes of the network, in pixels (default: those its resize rule needs)")  # fmt: skip
    add("--attach", type=Path, nargs="+", default=[], metavar="FILE", help="put these beside the model: a model card")
    add("--with-checkpoint", action="store_true", help=f"put the weights into the bundle, too, as {CHECKPOINT_FILE}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 after one line that says what went wrong."""
    parser = _parser()
    options = parser.parse_args(argv)
    options.attach = tuple(options.attach)
    keep_freed_memory()
    try:
        export(Request(**vars(options)), say=_print)
    except Exception as error:
        expected = isinstance(error, OSError | CheckpointError | ExportError | TraceError | ParityError | BundleError)
        if not (expected or is_no_memory(error) or is_of_onnxruntime(error)):
            raise
        line = " ".join((str(error) or type(error).__name__).split())
        sys.stderr.write(f"{parser.prog}: {line}\n")
        return 1
    return 0


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
