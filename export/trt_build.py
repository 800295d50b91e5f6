"""`python export/trt_build.py`, `ddetr build`: a checkpoint into a bundle with a TensorRT engine.

load -> bundle -> trace -> verify -> build -> check -> publish, by `export.engine_bundle`. A step that is finished is
kept in a folder beside the output, and is not done again while nothing it depends on has changed.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: its own folder has modules named as Python's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bundle import BundleError
from bundle.reader import CHECKPOINT_FILE
from export.build_errors import is_no_memory, is_no_room, way_out
from export.calibrate import is_of_onnxruntime
from export.engine_bundle import Request, build_engine
from export.flavour import FLAVOURS, BuildError
from export.malloc import keep_freed_memory
from export.onnx_export import ExportError, parse_canvases
from export.steps import Occupied
from export.trace import TraceError
from export.verify import ParityError
from models import VARIANTS, CheckpointError
from runtime import RuntimeUnavailable


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip().lower() for word in text.split(",") if word.strip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn a checkpoint into a bundle with a TensorRT engine: load, export, trace in the precision "
        "asked for, verify in ONNX Runtime, build, check the layers, publish. Run again after a break, it goes on.",
        epilog="example: ddetr build --checkpoint model.pth --output bundles/r50 --flavour rtx --targets sm86,sm89",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="an official .pth, a Hugging Face folder, a .safetensors of this project, or a bundle that carries it",
    )
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="the bundle's folder; one of the same checkpoint there gets the engine (default: --checkpoint's bundle)",
    )
    add("--variant", choices=tuple(VARIANTS), help="needed only where the checkpoint does not tell dilation")
    add("--precision", choices=("fp16", "fp32"), default="fp16", help="default %(default)s")
    add(
        "--flavour",
        choices=tuple(FLAVOURS),
        default="tensorrt",
        help="tensorrt builds on and for this machine's GPU, rtx for GeForce and workstation GPUs and without one",
    )
    add("--targets", type=_words, default=(), metavar="smNN,...", help="GPUs to build for (default: this machine's)")
    add("--hardware-compatible", action="store_true", help="tensorrt: an engine for Ampere and all later GPUs, slower")
    add(
        "--canvases",
        type=parse_canvases,
        default=(),
        metavar="HxW,...",
        help="of a new bundle: input sizes, a profile each (default: those its resize rule needs)",
    )
    add(
        "--typical-batch-size", type=int, default=4, metavar="N", help="kernels are chosen for it (default %(default)s)"
    )
    add("--max-batch-size", type=int, default=8, metavar="N", help="default %(default)s")
    add("--workspace-mib", type=int, metavar="N", help="the most memory one kernel may use (default: the GPU's)")
    add("--tf32", action="store_true", help="let float32 products round to 10 bits")
    add("--embed-plugin", action="store_true", help="put the plugin into the engine, for hosts that do not have it")
    add("--name", help="of a new bundle: the model's name (default: its variant)")
    add("--model-version", default="1", metavar="TEXT", help="of a new bundle (default %(default)s)")
    add("--with-checkpoint", action="store_true", help=f"put the weights into the bundle, too, as {CHECKPOINT_FILE}")
    add("--replace", action="store_true", help="replace a bundle of another checkpoint in --output")
    add(
        "--work",
        type=Path,
        metavar="DIR",
        help="where finished steps and the timing cache are kept (default: .NAME.build beside --output)",
    )
    return parser


EXPECTED = (
    OSError,
    CheckpointError,
    ExportError,
    TraceError,
    ParityError,
    BundleError,
    BuildError,
    RuntimeUnavailable,
    Occupied,
)
"""What a user can meet and mend; so is lack of memory, and what ONNX Runtime raises."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 after one line that says what went wrong and the way out."""
    parser = _parser()
    request = Request(**vars(parser.parse_args(argv)))
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells of each constant that it leaves alone
    keep_freed_memory()
    try:
        build_engine(request, say=_print)
    except KeyboardInterrupt:
        sys.stderr.write(f"{parser.prog}: interrupted; the same command goes on from the last finished step\n")
        return 130
    except Exception as error:
        if not (isinstance(error, EXPECTED) or is_no_room(error) or is_no_memory(error) or is_of_onnxruntime(error)):
            raise
        line = " ".join(f"{str(error) or type(error).__name__}{way_out(error)}".split())
        sys.stderr.write(f"{parser.prog}: {line}\n")
        return 1
    return 0


def _print(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
