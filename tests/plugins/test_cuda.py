"""The CUDA kernel on a GPU: the table of cases in every type, through PyTorch's adapter and through ONNX Runtime's.

What needs no GPU of it is in test_cuda_on_host.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

import plugins
from plugins import torch_cuda
from plugins.torch_op import Inputs
from tests.conftest import has_gpu
from tests.plugins import cases
from tests.plugins.cases import CASES, WRONG, Arrays, Case
from tests.plugins.test_onnxruntime_op import one_node

needs_kernel = pytest.mark.skipif(
    torch_cuda.library() is None, reason="the CUDA kernel is not built (python -m plugins.build): no nvcc"
)
needs_torch = pytest.mark.skipif(not torch.cuda.is_available(), reason="this PyTorch sees no GPU")
needs_provider = pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(),
    reason="this ONNX Runtime has no CUDA: onnxruntime-gpu",
)

TYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE_BFLOAT16 = (2e-5, 2**-8)  # as float32, and half a unit in the last place: sums are float32 in every type
# Lq = S, and queries enough for blocks to take squares of pixels.
ENCODER = Case("an encoder by squares", levels=((100, 134), (50, 67), (25, 34), (13, 17)), queries=17_821)


def on_gpu(inputs: Arrays, dtype: torch.dtype) -> Inputs:
    value, shapes, reference, offsets, logits = (torch.from_numpy(array).cuda() for array in inputs.values())
    return value.to(dtype), shapes, reference, offsets.to(dtype), logits.to(dtype)


def check(got: Tensor, given: Inputs) -> float:
    """Against the formula on the inputs as the kernel had them; the largest error."""
    names = ("value", "spatial_shapes", "reference_points", "sampling_offsets", "attention_logits")
    narrow = got.dtype == torch.bfloat16
    tensors = [t.float() if narrow and t.is_floating_point() else t for t in given]
    inputs = {name: t.cpu().numpy() for name, t in zip(names, tensors, strict=True)}
    answer = got.float() if narrow else got
    return cases.check(answer.cpu().numpy(), inputs, TOLERANCE_BFLOAT16 if narrow else None)


@needs_kernel
@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_it_serves_nothing() -> None:
    shapes = ((1, 2, 1, 4), (1, 2), (1, 1, 1, 2), (1, 1, 1, 1, 1, 2), (1, 1, 1, 1))
    value, sizes, reference, offsets, logits = (torch.ones(shape) for shape in shapes)
    assert not torch_cuda.serves((value, sizes.long(), reference, offsets, logits))


@pytest.mark.gpu
@needs_kernel
@needs_torch
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_case(dtype: torch.dtype) -> None:
    for case in (*CASES, ENCODER, replace(ENCODER, batch=2, sides=4, channels=16)):
        inputs = on_gpu(case.draw(), dtype)
        assert torch_cuda.serves(inputs)
        check(torch_cuda.forward(inputs), inputs)


@pytest.mark.gpu
@needs_kernel
@needs_torch
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_same_bits_wherever_shapes_are_and_on_any_stream(dtype: torch.dtype) -> None:
    value, shapes, *others = on_gpu(Case("", batch=2).draw(), dtype)
    wanted = torch_cuda.forward((value, shapes, *others))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = torch_cuda.forward((value, shapes.cpu(), *others))
    stream.synchronize()
    assert torch.equal(got, wanted)


@pytest.mark.gpu
@needs_kernel
@needs_torch
def test_views_that_are_not_of_16_bytes() -> None:
    value, shapes, reference, offsets, logits = on_gpu(Case("").draw(), torch.float16)
    wanted = torch_cuda.forward((value, shapes, reference, offsets, logits))
    shifted = torch.cat([value.flatten()[:1], value.flatten()])[1:].view_as(value)
    assert shifted.data_ptr() % 16
    got = torch_cuda.forward((shifted, shapes, reference, offsets, logits))
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-3)


@pytest.mark.gpu
@needs_kernel
@needs_torch
def test_it_can_be_captured_in_a_graph() -> None:
    """It neither waits nor allocates: an engine may replay it."""
    inputs = on_gpu(Case("").draw(), torch.float16)
    wanted = torch_cuda.forward(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = torch_cuda.forward(inputs)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, wanted)


@pytest.mark.gpu
@needs_kernel
@needs_torch
def test_a_refusal_is_an_error_with_its_name() -> None:
    value, shapes, reference, offsets, logits = on_gpu(Case("", points=64, queries=2).draw(), torch.float32)
    many = offsets.repeat_interleave(2, dim=4), logits.repeat_interleave(2, dim=3)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        torch_cuda.forward((value, shapes, reference, *many))
    assert torch_cuda.forward((value, shapes, reference, offsets, logits)).isfinite().all()


# --- ONNX Runtime ---


def session(dtype: type[np.floating]) -> ort.InferenceSession:
    library = plugins.onnxruntime_library()
    assert library is not None
    options = ort.SessionOptions()
    options.log_severity_level = 4  # the errors provoked here are raised as well
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(one_node(dtype=dtype).SerializeToString(), options, ["CUDAExecutionProvider"])


@pytest.mark.gpu
@needs_kernel
@needs_provider
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_case_in_onnxruntime(dtype: type[np.floating]) -> None:
    runs = session(dtype)
    for case in (*CASES, ENCODER):
        inputs = case.draw(dtype)
        cases.check(runs.run(None, inputs)[0], inputs)


@pytest.mark.gpu
@needs_kernel
@needs_provider
def test_wrong_shapes_in_onnxruntime() -> None:
    runs = session(np.float32)
    for what in WRONG:
        inputs, message = cases.spoiled(what)
        with pytest.raises(Exception, match=message):
            runs.run(None, inputs)
