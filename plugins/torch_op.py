"""PyTorch's adapter of the native kernels: they are called through ctypes, so that no libtorch is needed to build them.

Work is shared among PyTorch's own OpenMP threads. Where a kernel was not built, `serves_*` says no and the caller has
a slower way.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).parent / "built" / "libmsda_cpu.so"
MAX_LEVEL_POINTS = 256  # the kernels' arrays
NARROW = (torch.float16, torch.bfloat16)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""value, spatial_shapes, reference_points, sampling_offsets, attention_logits; shapes as in `models.msda`."""


class Params(ctypes.Structure):
    """MsdaParams of msda.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "pixels", "heads", "channels", "queries", "levels", "points")),
        *((name, ctypes.c_int64) for name in ("reference_dim", "type")),
        *((name, ctypes.c_void_p) for name in ("spatial_shapes", "value", "reference_points")),
        *((name, ctypes.c_void_p) for name in ("sampling_offsets", "attention_logits")),
    ]


TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # MsdaType


@cache
def library() -> ctypes.CDLL | None:
    """The CPU kernel, or None where it was not built, or not from this source."""
    if not LIBRARY.exists():
        return None
    loaded = ctypes.CDLL(str(LIBRARY))
    if not hasattr(loaded, "msda_forward_cpu"):  # built from an older source: python -m plugins.build
        return None
    pointer, threads = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_uint)
    loaded.msda_forward_cpu.argtypes = [ctypes.POINTER(Params), pointer, *threads]
    loaded.msda_backward_cpu.argtypes = [ctypes.POINTER(Params), *[pointer] * 4, *threads]
    loaded.msda_cpu_path.restype = ctypes.c_char_p
    return loaded


@cache
def _parallel() -> ctypes.c_void_p:
    """OpenMP's GOMP_parallel of the runtime that PyTorch has loaded; null where it has another: one thread works."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError):
        return ctypes.c_void_p(None)


def serves(inputs: Inputs) -> bool:
    """Whether the CPU kernel can take these inputs: it is built, nothing is float64, L*P fits its arrays."""
    value, _, reference_points, sampling_offsets, attention_logits = inputs
    return (
        value.device.type == "cpu"
        and all(t.dtype in TYPES for t in (value, reference_points, sampling_offsets, attention_logits))
        and 0 < sampling_offsets.shape[3] * sampling_offsets.shape[4] <= MAX_LEVEL_POINTS
        and library() is not None
    )


def forward(inputs: Inputs) -> Tensor:
    """The op on the CPU, [N, Lq, M*D] of value's type. float32 and float16 are read as they are, others are widened."""
    value = inputs[0]
    inputs = _dense(inputs, torch.float16 if {inputs[i].dtype for i in (0, 3, 4)} == {torch.float16} else torch.float32)
    n, _, heads, channels = value.shape
    output = inputs[0].new_empty((n, inputs[3].shape[1], heads * channels))
    _call("msda_forward_cpu", inputs, output)
    return output.to(value.dtype)


def backward(grad_output: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of value, reference_points, sampling_offsets and attention_logits, each of its input's type."""
    types = [inputs[i].dtype for i in (0, 2, 3, 4)]
    inputs = _dense(inputs, torch.float32)
    value, spatial_shapes, reference_points, sampling_offsets, attention_logits = inputs
    grad_value = torch.zeros_like(value)
    grad_locations = torch.empty_like(sampling_offsets)  # with respect to the locations in 0..1
    grad_logits = torch.empty_like(attention_logits)
    _call("msda_backward_cpu", inputs, grad_output.float().contiguous(), grad_value, grad_locations, grad_logits)
    if reference_points.shape[-1] == 2:
        wh = spatial_shapes.flip(-1).float()[None, None, None, :, None, :]
        grad_offsets = grad_locations / wh
        grad_reference = grad_locations.sum((2, 4))
    else:
        scale = 0.5 / sampling_offsets.shape[4]
        grad_offsets = grad_locations * (reference_points[:, :, None, :, None, 2:] * scale)
        grad_wh = (grad_locations * sampling_offsets * scale).sum((2, 4))
        grad_reference = torch.cat([grad_locations.sum((2, 4)), grad_wh], dim=-1)
    first, second, third, fourth = (
        gradient.to(dtype)
        for gradient, dtype in zip((grad_value, grad_reference, grad_offsets, grad_logits), types, strict=True)
    )
    return first, second, third, fourth


def params(inputs: Inputs) -> Params:
    """The kernels' view of dense inputs of one type; it holds addresses, so the inputs must outlive it."""
    value, _, reference_points, sampling_offsets, _ = inputs
    n, s, m, d = value.shape
    queries, levels, points = sampling_offsets.shape[1], sampling_offsets.shape[3], sampling_offsets.shape[4]
    sizes = (n, s, m, d, queries, levels, points, reference_points.shape[-1], TYPES[value.dtype])
    at = [inputs[i].data_ptr() for i in (1, 0, 2, 3, 4)]
    return Params(*sizes, *at)


def _dense(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    value, spatial_shapes, reference_points, sampling_offsets, attention_logits = inputs
    return (
        value.to(dtype).contiguous(),
        spatial_shapes.contiguous(),
        reference_points.float().contiguous(),
        sampling_offsets.to(dtype).contiguous(),
        attention_logits.to(dtype).contiguous(),
    )


def _call(name: str, inputs: Inputs, *arrays: Tensor) -> None:
    loaded = library()
    assert loaded is not None
    pointers = [array.data_ptr() for array in arrays]
    view = params(inputs)
    status: int = getattr(loaded, name)(ctypes.byref(view), *pointers, _parallel(), torch.get_num_threads())
    if status:
        raise RuntimeError(f"the msda kernel refused S={view.pixels}, L={view.levels}, P={view.points}")
