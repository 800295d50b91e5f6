"""PyTorch's adapter of the CUDA kernel: forward only, on the tensors' device and its current stream.

Training on a GPU keeps PyTorch's own form of the op, which differentiates.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

import plugins
from plugins.torch_op import MAX_LEVEL_POINTS, TYPES, Inputs, Params, params


@cache
def library() -> ctypes.CDLL | None:
    """The CUDA kernel, or None where it was not built."""
    path = plugins.cuda_library()
    if path is None:
        return None
    loaded = ctypes.CDLL(str(path))
    for name in ("msda_forward_cuda", "msda_forward_cuda_host_shapes"):
        getattr(loaded, name).argtypes = [ctypes.POINTER(Params), ctypes.c_void_p, ctypes.c_void_p]
    loaded.msda_cuda_error.restype = ctypes.c_char_p
    return loaded


def serves(inputs: Inputs) -> bool:
    """Whether the CUDA kernel can take these inputs: it is built, nothing is float64, L*P fits its arrays.

    All are on one GPU; spatial_shapes may be on the host.
    """
    value, spatial_shapes, reference_points, sampling_offsets, attention_logits = inputs
    others = (reference_points, sampling_offsets, attention_logits)
    return (
        value.device.type == "cuda"
        and all(t.device == value.device for t in others)
        and spatial_shapes.device in (value.device, torch.device("cpu"))
        and all(t.dtype in TYPES for t in (value, *others))
        and 0 < sampling_offsets.shape[3] * sampling_offsets.shape[4] <= MAX_LEVEL_POINTS
        and library() is not None
    )


def forward(inputs: Inputs) -> Tensor:
    """The op, [N, Lq, M*D] of value's type; shapes as in the contract, already checked. It waits for nothing.

    One type of value, sampling_offsets and attention_logits is read as it is, several are widened to float32. Raises
    RuntimeError with CUDA's name for it where the launch failed.
    """
    value, spatial_shapes, reference_points, sampling_offsets, attention_logits = inputs
    types = {t.dtype for t in (value, sampling_offsets, attention_logits)}
    dtype = value.dtype if len(types) == 1 else torch.float32
    dense: Inputs = (
        value.to(dtype).contiguous(),
        spatial_shapes.contiguous(),
        reference_points.float().contiguous(),
        sampling_offsets.to(dtype).contiguous(),
        attention_logits.to(dtype).contiguous(),
    )
    n, _, heads, channels = value.shape
    output = dense[0].new_empty((n, sampling_offsets.shape[1], heads * channels))
    loaded = library()
    assert loaded is not None  # serves() said so
    launch = loaded.msda_forward_cuda if spatial_shapes.is_cuda else loaded.msda_forward_cuda_host_shapes
    with torch.cuda.device(value.device):
        stream = torch.cuda.current_stream().cuda_stream
        status: int = launch(ctypes.byref(params(dense)), output.data_ptr(), stream)
    if status:
        raise RuntimeError(f"the msda kernel was not launched: {loaded.msda_cuda_error(status).decode()}")
    return output.to(value.dtype)
