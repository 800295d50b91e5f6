"""PyTorch's adapter of the CPU kernel: a differentiable function over ctypes, no libtorch at build time."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).parent / "msda" / "libmsda_cpu.so"
MAX_LEVEL_POINTS = 256  # the kernel's stack arrays
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _Params(ctypes.Structure):
    """MsdaParams of msda.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "pixels", "heads", "channels", "queries", "levels", "points")),
        *((name, ctypes.c_int64) for name in ("reference_dim", "type")),
        *((name, ctypes.c_void_p) for name in ("spatial_shapes", "value", "reference_points")),
        *((name, ctypes.c_void_p) for name in ("sampling_offsets", "attention_logits")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it was not built, or not from this source."""
    if not LIBRARY.exists():
        return None
    loaded = ctypes.CDLL(str(LIBRARY))
    if not hasattr(loaded, "msda_forward_rows"):  # built from an older source: python -m plugins.build
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    loaded.msda_forward_rows.argtypes = [ctypes.POINTER(_Params), count, count, pointer]
    loaded.msda_backward_f32.argtypes = [ctypes.POINTER(_Params), count, count, pointer, pointer, pointer, pointer]
    return loaded


def serves(value: Tensor, reference_points: Tensor, sampling_offsets: Tensor) -> bool:
    """Whether the kernel can take these inputs: it is built, on the CPU, nothing is float64, L*P fits its arrays."""
    return (
        value.device.type == "cpu"
        and all(t.dtype in FLOATS for t in (value, reference_points, sampling_offsets))
        and sampling_offsets.shape[3] * sampling_offsets.shape[4] <= MAX_LEVEL_POINTS
        and library() is not None
    )


def ms_deform_attn(
    value: Tensor, spatial_shapes: Tensor, reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor
) -> Tensor:
    """The op through the native kernel, forward and backward; shapes as in the contract, already checked.

    The kernel computes in float32; narrower inputs are widened first, and the output is of value's type.
    """
    floats = (t.float().contiguous() for t in (value, reference_points, sampling_offsets, attention_logits))
    wide, reference, offsets, logits = floats
    output: Tensor = _Op.apply(wide, spatial_shapes.contiguous(), reference, offsets, logits)  # type: ignore[no-untyped-call]
    return output.to(value.dtype)


def _params(
    value: Tensor, spatial_shapes: Tensor, reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor
) -> _Params:
    n, s, m, d = value.shape
    _, queries, _, levels, points, _ = sampling_offsets.shape
    inputs = (spatial_shapes, value, reference_points, sampling_offsets, attention_logits)
    sizes = (n, s, m, d, queries, levels, points, reference_points.shape[-1], 0)
    return _Params(*sizes, *(tensor.data_ptr() for tensor in inputs))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="msda")


def _in_parallel(function: Callable[..., int], units: int, params: _Params, *arrays: Tensor) -> None:
    """Share the units of work among as many threads as torch uses; ctypes releases the interpreter lock."""
    threads = max(1, min(torch.get_num_threads(), units))
    pointers = [array.data_ptr() for array in arrays]
    bounds = [units * i // threads for i in range(threads + 1)]

    def part(i: int) -> int:
        return function(ctypes.byref(params), bounds[i], bounds[i + 1], *pointers)

    statuses = [part(0)] if threads == 1 else list(_pool(threads).map(part, range(threads)))
    if any(statuses):
        raise RuntimeError(f"the msda kernel refused L={params.levels}, P={params.points}, R={params.reference_dim}")


class _Op(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        value, _, _, sampling_offsets, _ = inputs
        ctx.save_for_backward(*inputs)
        output = value.new_empty(value.shape[0], sampling_offsets.shape[1], value.shape[2] * value.shape[3])
        loaded = library()
        assert loaded is not None  # serves() said so
        params = _params(*inputs)
        _in_parallel(loaded.msda_forward_rows, params.batch * params.queries, params, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        value, spatial_shapes, reference_points, sampling_offsets, attention_logits = ctx.saved_tensors
        grad_value = torch.zeros_like(value)
        grad_locations = torch.empty_like(sampling_offsets)
        grad_logits = torch.empty_like(attention_logits)
        loaded = library()
        assert loaded is not None
        params = _params(*ctx.saved_tensors)
        arrays = (gradients[0].contiguous(), grad_value, grad_locations, grad_logits)
        _in_parallel(loaded.msda_backward_f32, params.batch * params.heads, params, *arrays)
        if reference_points.shape[-1] == 2:
            wh = spatial_shapes.flip(-1).to(value.dtype)[None, None, None, :, None, :]
            grad_offsets = grad_locations / wh
            grad_reference = grad_locations.sum((2, 4)) if ctx.needs_input_grad[2] else None
        else:
            scale = 0.5 / sampling_offsets.shape[4]
            grad_offsets = grad_locations * (reference_points[:, :, None, :, None, 2:] * scale)
            grad_reference = None
            if ctx.needs_input_grad[2]:
                grad_wh = (grad_locations * sampling_offsets * scale).sum((2, 4))
                grad_reference = torch.cat([grad_locations.sum((2, 4)), grad_wh], dim=-1)
        return grad_value, None, grad_reference, grad_offsets, grad_logits
