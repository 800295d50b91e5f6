"""One engine in a process of its own, for benchmarks.r50: it answers lines of JSON on its standard input and output.

{"run": 1}             -> {"ms": [...]}             so many forwards, each timed
{"peak": true}         -> {"mib": ...}              the most memory the process has held so far
{"answers": "a.npz"}   -> {}                        logits [Q, classes] and boxes [Q, 4] of a forward, to that file
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PORT, WEIGHTS, PICTURE = "port", "port", "picture-{}.npy"  # inside the folder
GRAPH, PROBE = "{}.onnx", "{}-raw.onnx"  # the raw outputs beside the others

Forward = Callable[[], Any]
Answers = Callable[[], tuple[Any, Any]]


def port(folder: Path, picture: np.ndarray, threads: int) -> tuple[Forward, Answers]:
    """The Hugging Face port in PyTorch, eager."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    network = transformers.DeformableDetrForObjectDetection.from_pretrained(
        folder / WEIGHTS, attn_implementation="eager"
    ).eval()
    torch.set_num_threads(threads)
    pixels = _normalised(picture)
    mask = torch.ones(pixels.shape[0], *pixels.shape[2:], dtype=torch.long)

    def forward() -> Any:
        with torch.inference_mode():
            return network(pixels, mask)

    def answers() -> tuple[Any, Any]:
        output = forward()
        return output.logits[0].numpy(), output.pred_boxes[0].numpy()

    return forward, answers


def pytorch(folder: Path, picture: np.ndarray, threads: int) -> tuple[Forward, Answers]:
    """This project's network in PyTorch."""
    import torch

    from models import load_checkpoint

    network = load_checkpoint(folder / WEIGHTS, "r50")
    torch.set_num_threads(threads)
    pixels = _normalised(picture)

    def forward() -> Any:
        with torch.inference_mode():
            return network(pixels)

    def answers() -> tuple[Any, Any]:
        output = forward()
        return output["pred_logits"][0].numpy(), output["pred_boxes"][0].numpy()

    return forward, answers


def onnx_runtime(folder: Path, picture: np.ndarray, threads: int, graph: str, native: bool) -> tuple[Forward, Answers]:
    """An exported graph, with the native kernel or with the function that the file carries."""
    import onnxruntime

    import plugins

    feeds = {"images": picture, "sizes": np.array([picture.shape[1:3]], dtype=np.int64)}

    def session(file: str) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.enable_mem_pattern = False
        # Its threads would spin on beside the next engine.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if native:
            library = plugins.onnxruntime_library()
            if library is None:
                raise RuntimeError("the native kernel is not built: make native")
            options.register_custom_ops_library(str(library))
        return onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])

    served = session(GRAPH.format(graph))

    def answers() -> tuple[Any, Any]:
        logits, boxes = session(PROBE.format(graph)).run(["pred_logits", "pred_boxes"], feeds)
        return logits[0], boxes[0]

    return lambda: served.run(None, feeds), answers


ENGINES: dict[str, Callable[[Path, np.ndarray, int], tuple[Forward, Answers]]] = {
    "port": port,
    "pytorch": pytorch,
    **{
        f"onnxruntime-{graph}-{op}": lambda *given, graph=graph, op=op: onnx_runtime(*given, graph, op == "native")
        for graph in ("plain", "cpu")
        for op in ("function", "native")
    },
}


def _normalised(picture: np.ndarray) -> Any:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W], as the official pipeline hands it to the network."""
    import torch

    from models.config import IMAGENET_MEAN, IMAGENET_STD

    return torch.from_numpy(((picture / 255 - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32)).permute(0, 3, 1, 2)


def _peak_mib() -> float:
    """Not getrusage's ru_maxrss: a process inherits that from the one that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> int:
    """Answer until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=tuple(ENGINES), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    said, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not come between
    picture = np.load(args.folder / PICTURE.format(args.size))
    forward, answers = ENGINES[args.engine](args.folder, picture, args.threads)

    def say(reply: dict[str, Any]) -> None:
        said.write(json.dumps(reply) + "\n")
        said.flush()

    say({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            took = []
            for _ in range(request["run"]):
                started = time.perf_counter()
                forward()
                took.append((time.perf_counter() - started) * 1e3)
            say({"ms": took})
        elif "peak" in request:
            say({"mib": _peak_mib()})
        else:
            logits, boxes = answers()
            np.savez(request["answers"], logits=logits, boxes=boxes)
            say({})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
