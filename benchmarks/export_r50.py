"""What a full-size export costs: seconds, memory, file size and parity of a variant with random weights.

python -m benchmarks.export_r50 --variant r50-two-stage --output bundles/random
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.machine import machine
from export.onnx_export import Request, export, parse_canvases
from models import VARIANTS, DeformableDetr, build_model, save_checkpoint

CANVASES = parse_canvases("800x1088,1088x800,800x1344,1344x800")


def random_model(variant: str) -> DeformableDetr:
    """Fresh weights with noise on heads, offsets and statistics: at their initial values they hide errors."""
    torch.manual_seed(0)
    model = build_model(VARIANTS[variant]).eval()
    noise = {"class_embed": 0.1, "attention_weights": 0.1, "bbox_embed": 0.02, "offsets": 0.02, "level_embed": 0.02}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = next((scale for part, scale in noise.items() if part in name), 0.02 if parameter.dim() < 2 else 0.0)
            parameter.add_(torch.randn_like(parameter) * scale)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
            if name.endswith("running_var"):
                buffer.mul_(torch.rand_like(buffer) + 0.5)
    return model


def main() -> int:
    """Export, printing each step, and then the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="r50-two-stage")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    print(f"{machine()}; torch {torch.__version__}, {torch.get_num_threads()} threads; {args.variant}")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "random.safetensors"
        save_checkpoint(random_model(args.variant), checkpoint)
        bundle = export(Request(checkpoint, args.output, canvases=CANVASES), lambda line: print(line, flush=True))
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        f"{time.perf_counter() - started:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of processor time, "
        f"peak {used.ru_maxrss / 2**20:.1f} GiB, file {bundle.onnx_path.stat().st_size / 2**20:.0f} MiB"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
