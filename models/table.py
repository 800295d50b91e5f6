"""The paper's table from this code: `python -m models.table` prints parameters and multiply-adds of every variant.

Counted, as one operation each (the paper's "FLOP"): the multiply-adds of convolutions, linear layers and the decoder's
self-attention, and five for each channel of each sampled point (four corners and the attention weight: appendix A.1 of
the paper). Not counted: normalisation, activations, softmax, encodings, top-k. Nothing is computed: shapes alone run
through the network, on torch's meta device.

Where the differences to the published figures come from: DETR's authors averaged over the first 100 pictures of COCO's
validation part, and the paper, which names no size, compares with them. 800x1100 stands for those pictures. The
single-scale rows agree with it to the digit; the multi-scale rows have a finer level whose size counts more (-1.2%;
173.1 G at 800x1115). The published table gives the two-stage model no more than the others; scoring every pixel of the
encoder costs 1.8 G here, and boxes are computed of the best pixels only (of all of them: 2.3 G more, +1.3%).
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.config import VARIANTS, DeformableDetrConfig
from models.deformable_detr import build_model

PAPER_SIZE = (800, 1100)  # (h, w) px
PUBLISHED = {  # parameters in M, multiply-adds in G
    "r50-single-scale": (34, 78),
    "r50-single-scale-dc5": (34, 128),
    "r50": (40, 173),
    "r50-refine": (41, 173),
    "r50-two-stage": (41, 173),
}
OPERATIONS_PER_SAMPLE = 5  # of one channel


@dataclass(frozen=True)
class Cost:
    """What a network weighs, and what one picture costs it."""

    parameters: int
    multiply_adds: int


def cost(config: DeformableDetrConfig, size: tuple[int, int] = PAPER_SIZE) -> Cost:
    """Count parameters, and multiply-adds for one unpadded picture of `size` (h, w) px."""
    with torch.device("meta"):
        model = build_model(config).eval().requires_grad_(False)
        pixels = torch.zeros(1, 3, *size)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.msda.ms_deform_attn: _sampling_flops})
    with counter, torch.no_grad():
        model(pixels)
    # A frozen norm's constants are buffers and, as in the paper, no parameters.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, counter.get_total_flops() // 2)  # torch counts a multiply-add as two


def _sampling_flops(
    value: Sequence[int], _shapes: Any, _points: Any, offsets: Sequence[int], *_: Any, **__: Any
) -> int:
    batch, queries, heads, levels, points, _two = offsets
    return 2 * OPERATIONS_PER_SAMPLE * batch * queries * heads * levels * points * value[-1]


def table(size: tuple[int, int] = PAPER_SIZE) -> str:
    """The rows of the paper's table at `size` (h, w) px, beside the published figures."""
    height, width = size
    lines = [
        f"{'':22} {'parameters, M':>20} {f'multiply-adds at {height}x{width}, G':>36}",
        f"{'variant':22} {'here':>10} {'paper':>9} {'here':>18} {'paper':>8} {'':>8}",
    ]
    for name, (published_parameters, published_operations) in PUBLISHED.items():
        counted = cost(VARIANTS[name], size)
        parameters, operations = counted.parameters / 1e6, counted.multiply_adds / 1e9
        difference = f"{operations / published_operations - 1:+.1%}"
        lines.append(
            f"{name:22} {parameters:10.2f} {published_parameters:9} "
            f"{operations:18.1f} {published_operations:8} {difference:>8}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m models.table",
        description="The paper's table from this code: parameters and multiply-adds of every variant.",
        epilog="Example: python -m models.table --size 800 1333",
    )
    parser.add_argument("--size", nargs=2, type=int, default=PAPER_SIZE, metavar=("H", "W"), help="pixels (800 1100)")
    height, width = parser.parse_args(arguments).size
    print(table((height, width)))


if __name__ == "__main__":
    main()
