"""The op alone on the CPU, at the size of the paper's encoder for a picture of 800x1333: our paths against PyTorch.

python -m benchmarks.op --threads 2

PyTorch's form is `models.msda.reference_ms_deform_attn` (softmax, grid_sample, weighted sum), with glibc's malloc as it
is and tuned not to give pages back. The floor is as many loads and multiply-adds as the op has, from the innermost
cache.
Contestants are processes that take turns; medians.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.interleave import contestants, interleaved
from benchmarks.machine import machine
from models.msda import reference_ms_deform_attn
from plugins import build, torch_op

LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))  # of 800x1333: 22223 pixels, each a query
HEADS, CHANNELS, POINTS = 8, 32, 4
TUNED = {"MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
RUNS_A_TURN = {"torch": 1, "ours": 5, "floor": 20}


def encoder_inputs(dtype: torch.dtype) -> torch_op.Inputs:
    """A layer's inputs as in a trained encoder: each head looks its own way, 1 to 4 pixels far, and wavers a little."""
    generator = torch.Generator().manual_seed(0)
    pixels = sum(h * w for h, w in LEVELS)
    centres = torch.cat(
        [
            torch.stack(torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij"), -1)
            .flip(-1)
            .view(-1, 2)
            for h, w in LEVELS
        ]
    )
    angle = torch.arange(HEADS) * (2 * torch.pi / HEADS)
    ring = torch.stack([angle.cos(), angle.sin()], -1)[:, None, None] * torch.arange(1, POINTS + 1)[:, None]
    offsets = ring + 0.5 * torch.randn(1, pixels, HEADS, len(LEVELS), POINTS, 2, generator=generator)
    return (
        torch.randn(1, pixels, HEADS, CHANNELS, generator=generator).to(dtype),
        torch.tensor(LEVELS),
        centres[None, :, None].repeat(1, 1, len(LEVELS), 1),
        offsets.to(dtype),
        torch.randn(1, pixels, HEADS, len(LEVELS) * POINTS, generator=generator).to(dtype),
    )


def work(kind: str, threads: int) -> None:
    """A contestant: say "ready", then run at every line read and print the milliseconds of one run."""
    torch.set_num_threads(threads)
    run = _floor(kind, threads) if kind.startswith("floor") else _op(kind)
    repeats = RUNS_A_TURN[kind.split(" ")[0]]
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        run()
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        print((time.perf_counter() - started) * 1e3 / repeats, flush=True)


def _op(kind: str) -> Callable[[], Tensor]:
    name, *options = kind.split(" ")
    inputs = encoder_inputs(torch.float16 if "float16" in options else torch.float32)
    if name == "torch":
        return lambda: reference_ms_deform_attn(*inputs)
    library = torch_op.library()
    if library is None or library.msda_set_cpu_path(options[0].encode()):
        raise SystemExit(f"{options[0]} does not run here")
    return lambda: torch_op.forward(inputs)


def _floor(kind: str, threads: int) -> Callable[[], list[None]]:
    """All heads of all queries, shared among threads."""
    compiler = build.compiler()
    if compiler is None:
        raise SystemExit("no C++ compiler for the floor")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "floor.so"
        source = Path(__file__).with_name("op_floor.cpp")
        subprocess.run([*compiler, "-std=c++17", "-O3", "-fPIC", "-shared", str(source), "-o", str(path)], check=True)
        function = getattr(ctypes.CDLL(str(path)), "floor_" + kind.split(" ")[1])
    heads = sum(h * w for h, w in LEVELS) * HEADS
    values = [np.ones(32 * CHANNELS, np.float32) for _ in range(threads)]
    outputs = [np.zeros(CHANNELS, np.float32) for _ in range(threads)]
    weights = np.ones(64, np.float32)
    pool = ThreadPoolExecutor(threads)

    def part(i: int) -> None:
        share = ctypes.c_int64(heads * (i + 1) // threads - heads * i // threads)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (values[i], weights, outputs[i])]
        function(pointers[0], pointers[1], share, pointers[2])

    return lambda: list(pool.map(part, range(threads)))


def main(argv: list[str] | None = None) -> int:
    """Print the table, and ours against float64."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.contestant:
        work(args.contestant, args.threads)
        return 0
    library = torch_op.library()
    if library is None:
        parser.exit(1, "python -m benchmarks.op: the native kernel is not built: make native\n")
    paths = [path for path in ("avx512", "avx2", "portable") if not library.msda_set_cpu_path(path.encode())]
    kinds = ["torch", "torch tuned", *(f"ours {path}{narrow}" for path in paths for narrow in ("", " float16"))]
    kinds += [f"floor {path}" for path in paths if path != "portable"]
    plain = {name: value for name, value in os.environ.items() if name not in TUNED}
    commands = {
        kind: (
            ["-m", "benchmarks.op", "--contestant", kind, "--threads", str(args.threads)],
            plain | (TUNED if "tuned" in kind else {}),
        )
        for kind in kinds
    }
    print(f"{machine()}; torch {torch.__version__}, {args.threads} threads, medians of {args.rounds} rounds")
    with contestants(commands) as started:
        took = interleaved(started, args.rounds)
    errors = _errors(paths)
    print(
        "| | ms | torch / it | torch tuned / it | it / floor | largest error against float64 |\n"
        "|---|---|---|---|---|---|"
    )
    for kind, milliseconds in took.items():
        floor = took.get("floor avx2" if "avx2" in kind else f"floor {paths[0]}", float("nan"))
        print(
            f"| {kind} | {milliseconds:.2f} | {took['torch'] / milliseconds:.1f} "
            f"| {took['torch tuned'] / milliseconds:.1f} | {milliseconds / floor:.1f} | {errors.get(kind, '')} |"
        )
    return 0


def _errors(paths: list[str]) -> dict[str, str]:
    errors = {}
    for narrow, dtype in (("", torch.float32), (" float16", torch.float16)):
        inputs = encoder_inputs(dtype)
        wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
        wanted = reference_ms_deform_attn(*wide)
        for path in paths:
            library = torch_op.library()
            assert library is not None
            library.msda_set_cpu_path(path.encode())
            errors[f"ours {path}{narrow}"] = f"{(torch_op.forward(inputs).double() - wanted).abs().max():.1e}"
        if dtype == torch.float32:
            errors["torch"] = f"{(reference_ms_deform_attn(*inputs).double() - wanted).abs().max():.1e}"
    return errors


if __name__ == "__main__":
    raise SystemExit(main())
