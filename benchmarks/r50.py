"""The whole r50, one picture at a time: milliseconds, peak memory and answers of every engine, the same weights in all.

    python -m benchmarks.r50 --folder runs/r50

The folder is filled at first: random weights as a checkpoint of the Hugging Face port (or `--checkpoint`, a folder that
transformers reads), and the exported graph, once as traced and once laid out for a CPU as bundles have it. Each engine
is a process of its own, and they take turns: in a round each runs four forwards that count, so that what disturbs the
machine disturbs all. Tuned malloc keeps freed blocks (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_) instead of
handing them back page by page.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from benchmarks.r50_worker import GRAPH, PICTURE, PROBE, WEIGHTS
from bundle import Canvas

TUNED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
ENGINES: dict[str, tuple[str, dict[str, str]]] = {  # name in the table -> the worker's engine and its environment
    "Hugging Face port, default malloc": ("port", {}),
    "Hugging Face port, tuned malloc": ("port", TUNED_MALLOC),
    "this network in PyTorch, tuned malloc": ("pytorch", TUNED_MALLOC),
    "ONNX Runtime, function, graph as traced": ("onnxruntime-plain-function", {}),
    "ONNX Runtime, function": ("onnxruntime-cpu-function", {}),
    "ONNX Runtime, native kernel, graph as traced": ("onnxruntime-plain-native", {}),
    "ONNX Runtime, native kernel": ("onnxruntime-cpu-native", {}),
}
WANTED, REFERENCE = "ONNX Runtime, native kernel", "Hugging Face port, tuned malloc"
GRAPHS = {"plain": False, "cpu": True}
FORWARDS = 4  # of a turn that count; the one before them fetches what the others' turns drove out of the caches
NOISE = {"class_embed": 0.1, "attention_weights": 0.1, "bbox_embed": 0.02, "offsets": 0.02, "level_embed": 0.02}


@dataclass
class Worker:
    """A running engine."""

    process: subprocess.Popen[str]
    ms: list[float] = field(default_factory=list)
    mib: float = 0.0

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises RuntimeError where the process has ended instead."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.listen()

    def listen(self) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def prepare(folder: Path, checkpoint: Path | None) -> None:
    """Fill the folder with what it lacks; graphs older than the code that traces them are traced again."""
    import onnx

    from export.trace import RAW_OUTPUTS, trace
    from models import load_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / WEIGHTS
    if checkpoint is not None:
        shutil.rmtree(weights, ignore_errors=True)
        shutil.copytree(checkpoint, weights)
    elif not weights.exists():
        print("random weights ...", flush=True)
        _random_port().save_pretrained(weights)
    newest = max(path.stat().st_mtime for path in _sources(weights))
    model = None
    for graph, for_cpu in GRAPHS.items():
        file = folder / GRAPH.format(graph)
        if file.exists() and file.stat().st_mtime > newest:
            continue
        print(f"tracing {file} ...", flush=True)
        model = model or load_checkpoint(weights, "r50")
        proto = trace(model, for_cpu=for_cpu)
        probe = onnx.ModelProto()
        probe.CopyFrom(proto)
        for name in RAW_OUTPUTS:
            probe.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        onnx.save(probe, folder / PROBE.format(graph))
        onnx.save(proto, file)


def _sources(weights: Path) -> list[Path]:
    root = Path(__file__).parent.parent
    return [*root.glob("export/*.py"), *root.glob("models/*.py"), *weights.iterdir()]


def _random_port() -> Any:
    """The port's r50 on transformers' own ResNet; its initial weights with noise, without which they hide errors."""
    import torch
    import transformers

    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = transformers.DeformableDetrConfig(backbone_config=backbone, use_timm_backbone=False, num_labels=91)
    network = transformers.DeformableDetrForObjectDetection(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            scale = next((scale for part, scale in NOISE.items() if part in name), 0.02 if parameter.dim() < 2 else 0.0)
            parameter.add_(torch.randn_like(parameter) * scale)
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
            if name.endswith("running_var"):
                buffer.mul_(torch.rand_like(buffer) + 0.5)
    return network


def measure(folder: Path, size: Canvas, threads: int, rounds: int, engines: dict[str, Any]) -> dict[str, Worker]:
    """Every engine at one size, in turns; their answers lie in the folder afterwards."""
    from export.verify import draw_pictures

    np.save(folder / PICTURE.format(size), draw_pictures(size, ((1.0, 1.0),), seed=0).images)
    workers: dict[str, Worker] = {}
    try:
        for name, (engine, variables) in engines.items():
            environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
            environment |= {"OMP_NUM_THREADS": str(threads), **variables}
            command = [sys.executable, "-m", "benchmarks.r50_worker", "--engine", engine, "--folder", str(folder)]
            command += ["--size", str(size), "--threads", str(threads)]
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            workers[name] = Worker(process)
            workers[name].listen()
            workers[name].ask(run=2)  # pages, caches, plans
        pids = [os.getpid(), *(worker.process.pid for worker in workers.values())]
        started, before = time.perf_counter(), _foreign_seconds(pids)
        for _ in range(rounds):
            for worker in workers.values():
                worker.ms += worker.ask(run=1 + FORWARDS)["ms"][1:]
        foreign = (_foreign_seconds(pids) - before) / (time.perf_counter() - started)
        print(f"{size}: other programs kept {foreign:.2f} cores busy", flush=True)
        for name, worker in workers.items():
            worker.mib = worker.ask(peak=True)["mib"]
            worker.ask(answers=str(folder / _answers(name, size)))
    finally:
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()
    return workers


def _foreign_seconds(pids: list[int]) -> float:
    """Processor time, since the machine started, of everything that is none of these processes."""
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    ours = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ours += int(fields[11]) + int(fields[12])
    return (user + nice + system + irq + softirq + steal - ours) / ticks


def _answers(name: str, size: Canvas) -> str:
    return re.sub(r"\W+", "-", f"answers {name} {size}") + ".npz"


def _error(folder: Path, name: str, size: Canvas) -> str:
    """Largest difference of logits / of boxes (of the image's side) from the reference engine's, over all queries."""
    got, want = (np.load(folder / _answers(each, size)) for each in (name, REFERENCE))
    return " / ".join(f"{np.abs(got[key] - want[key]).max():.1e}" for key in ("logits", "boxes"))


def table(folder: Path, results: dict[Canvas, dict[str, Worker]]) -> str:
    """A row an engine; a cell is the median, the best, how many times the wanted engine's median it is, the peak."""
    names = list(next(iter(results.values())))
    lines = [
        "| engine | " + " | ".join(f"{size}: ms (best), x | MiB | logits / boxes" for size in results) + " |",
        "|---" * (1 + 3 * len(results)) + "|",
    ]
    for name in names:
        cells = []
        for size, workers in results.items():
            worker = workers[name]
            median = statistics.median(worker.ms)
            times = f", {median / statistics.median(workers[WANTED].ms):.2f}" if WANTED in workers else ""
            error = _error(folder, name, size) if name != REFERENCE and REFERENCE in workers else ""
            cells += [f"{median:.0f} ({min(worker.ms):.0f}){times}", f"{worker.mib:.0f}", error]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Prepare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, help="keeps weights, graphs and answers (default: a temporary one)")
    add("--checkpoint", type=Path, help="a Hugging Face folder of the r50 instead of random weights")
    add("--sizes", nargs="+", default=["480x640", "800x1066"], metavar="HxW")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=7)
    add("--engines", nargs="+", default=list(ENGINES), choices=tuple(ENGINES), metavar="NAME")
    args = parser.parse_args()
    sizes = [Canvas(height=int(h), width=int(w)) for h, w in (size.split("x") for size in args.sizes)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        prepare(folder, args.checkpoint)
        print(f"{machine()}; {args.threads} threads, batch 1, medians of {FORWARDS * args.rounds}", flush=True)
        engines = {name: ENGINES[name] for name in args.engines}
        results = {size: measure(folder, size, args.threads, args.rounds, engines) for size in sizes}
        print(table(folder, results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
