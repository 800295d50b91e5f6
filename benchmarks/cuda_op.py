"""The op alone on a GPU, at the size of the paper's network for a picture of 800x1333: ours and the original CUDA op.

python -m benchmarks.cuda_op --original Deformable-DETR

`--original` is a checkout of github.com/fundamentalvision/Deformable-DETR. Its kernel is compiled as it is, behind a
binding of ours: its own needs a PyTorch of its time, and knows no half. Its side counts what our kernel does within:
the softmax, and the sampling locations. The floor is the time in which this GPU copies as many bytes as the op must
read and write. Both sides run from CUDA graphs, over sets of inputs that together exceed the cache, and take turns;
medians.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.op import encoder_inputs
from models.msda import reference_ms_deform_attn
from plugins import torch_cuda
from plugins.torch_op import Inputs

DECODER_QUERIES = 300
ROUNDS, CALLS = 30, 20  # turns of each side, and calls in a graph
CHECKED_QUERIES = 1000  # compared with float64, of every image
CACHES = 3  # the sets of inputs, in sizes of the GPU's second-level cache

BINDING = """
#include "cuda/ms_deform_im2col_cuda.cuh"

#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>

void forward(const at::Tensor& value, const at::Tensor& shapes, const at::Tensor& starts, const at::Tensor& locations,
             const at::Tensor& weights, at::Tensor output) {
  AT_DISPATCH_FLOATING_TYPES_AND_HALF(value.scalar_type(), "ms_deform_attn", [&] {
    ms_deformable_im2col_cuda<scalar_t>(
        c10::cuda::getCurrentCUDAStream(), value.data_ptr<scalar_t>(), shapes.data_ptr<int64_t>(),
        starts.data_ptr<int64_t>(), locations.data_ptr<scalar_t>(), weights.data_ptr<scalar_t>(), value.size(0),
        value.size(1), value.size(2), value.size(3), shapes.size(0), locations.size(1), locations.size(4),
        output.data_ptr<scalar_t>());
  });
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("forward", &forward); }
"""
# The header it includes has left PyTorch; what it is included for is here now.
ATOMICS = "#include <ATen/cuda/Atomic.cuh>\n"

Op = Callable[[Inputs], Tensor]


def original_op(checkout: Path, folder: Path) -> Op:
    """The original kernel with its softmax and locations, in value's type throughout. Raises SystemExit without it."""
    source = checkout / "models" / "ops" / "src"
    if not (source / "cuda" / "ms_deform_im2col_cuda.cuh").is_file():
        raise SystemExit(f"{checkout} is no checkout of Deformable-DETR: it lacks models/ops/src/cuda")
    from torch.utils import cpp_extension  # wants a toolkit, which not every run needs

    (folder / "THC").mkdir()
    (folder / "THC" / "THCAtomics.cuh").write_text(ATOMICS)
    (folder / "original.cu").write_text(BINDING)
    extension: Any = cpp_extension.load(
        "ddetr_original_op",
        [str(folder / "original.cu")],
        extra_include_paths=[str(folder), str(source)],
        extra_cuda_cflags=["-O3"],
        build_directory=str(folder),
    )

    def run(inputs: Inputs) -> Tensor:
        value, shapes, reference, offsets, logits = inputs
        n, queries, heads, levels, points, _ = offsets.shape
        weights = logits.softmax(-1).view(n, queries, heads, levels, points)
        wh = shapes.flip(-1)[None, None, None, :, None, :]
        locations = (reference[:, :, None, :, None, :] + offsets / wh).to(value.dtype)
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
        output = value.new_empty(n, queries, heads * value.shape[3])
        extension.forward(value, shapes, starts, locations, weights, output)
        return output

    return run


def drawn(dtype: torch.dtype, batch: int, decoder: bool) -> Inputs:
    """A layer's inputs on the GPU."""
    value, shapes, reference, offsets, logits = encoder_inputs(dtype)
    if decoder:
        chosen = torch.randperm(value.shape[1], generator=torch.Generator().manual_seed(1))[:DECODER_QUERIES]
        reference, offsets, logits = reference[:, chosen], offsets[:, chosen], logits[:, chosen]

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.repeat(batch, *[1] * (tensor.dim() - 1)).cuda()

    return repeated(value), shapes.cuda(), repeated(reference), repeated(offsets), repeated(logits)


def error(op: Op, inputs: Inputs) -> tuple[float, float]:
    """Against float64: the largest difference, and the norm of all by the answer's norm."""
    value, shapes, reference, offsets, logits = inputs
    chosen = torch.randperm(offsets.shape[1], generator=torch.Generator().manual_seed(2))[:CHECKED_QUERIES].cuda()
    got = op(inputs)[:, chosen].double()
    some = (reference[:, chosen].double(), offsets[:, chosen].double(), logits[:, chosen].double())
    wanted = reference_ms_deform_attn(value.double(), shapes, *some)
    return (got - wanted).abs().max().item(), ((got - wanted).norm() / wanted.norm()).item()


def graph_of(op: Op, sets: list[Inputs]) -> torch.cuda.CUDAGraph:
    """CALLS calls, each on the next set."""
    for inputs in sets:
        op(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(CALLS):
            op(sets[call % len(sets)])
    return graph


def turn(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / CALLS


def taking_turns(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, float]:
    """The median microseconds of a call of each, after rounds that do not count."""
    took: dict[str, list[float]] = {name: [] for name in graphs}
    for round_number in range(ROUNDS + 3):
        for name, graph in graphs.items():
            microseconds = turn(graph)
            if round_number >= 3:
                took[name].append(microseconds)
    return {name: statistics.median(times) for name, times in took.items()}


def moved(inputs: Inputs) -> int:
    """Bytes that the op must read and write."""
    value, _, reference, offsets, logits = inputs
    output = offsets.shape[0] * offsets.shape[1] * value.shape[2] * value.shape[3] * value.element_size()
    return sum(t.numel() * t.element_size() for t in (value, reference, offsets, logits)) + output


def copy_bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            target.copy_(source)
    times = [turn(graph) for _ in range(10)]
    return 2 * source.numel() / (statistics.median(times) * 1e-6)


def main() -> int:
    """Print the table; 1, and one line, where there is no GPU or no kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, help="a checkout of Deformable-DETR; without it ours runs alone")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU that this PyTorch sees: nothing was measured", file=sys.stderr)
        return 1
    if torch_cuda.library() is None:
        print("the CUDA kernel is not built: python -m plugins.build, with nvcc", file=sys.stderr)
        return 1

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        ops: dict[str, Op] = {"ours": torch_cuda.forward}
        if args.original is not None:
            ops["original"] = original_op(args.original, Path(folder))
        properties = torch.cuda.get_device_properties(0)
        bandwidth = copy_bandwidth()
        print(f"{properties.name}, PyTorch {torch.__version__}, {machine()}; copies {bandwidth / 1e9:.0f} GB/s")
        print("us a call | largest error, relative error against float64")
        print(f"{'layer':8} {'type':8} {'N':>2} {'floor':>7} {'ours':>7} {'original':>9} {'ratio':>6}  errors")
        for decoder in (False, True):
            for dtype in (torch.float32, torch.float16):
                for batch in args.batch_sizes:
                    inputs = drawn(dtype, batch, decoder)
                    bytes_moved = moved(inputs)
                    errors = "; ".join(
                        f"{name} {largest:.1e}, {relative:.1e}"
                        for name, op in ops.items()
                        for largest, relative in [error(op, inputs)]
                    )
                    count = min(CALLS, 1 + CACHES * properties.L2_cache_size // bytes_moved)
                    sets = [inputs, *(tuple(t.clone() for t in inputs) for _ in range(count - 1))]
                    times = taking_turns({name: graph_of(op, sets) for name, op in ops.items()})  # type: ignore[arg-type]
                    ours, original = times["ours"], times.get("original", float("nan"))
                    print(
                        f"{'decoder' if decoder else 'encoder':8} {str(dtype).removeprefix('torch.'):8} {batch:2}"
                        f" {bytes_moved / bandwidth * 1e6:7.1f} {ours:7.1f} {original:9.1f} {original / ours:6.2f}"
                        f"  {errors}"
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
