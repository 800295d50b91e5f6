"""PyTorch's op: every case on every path of the CPU kernel, its gradients, and what PyTorch asks of an op."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from models.msda import ms_deform_attn, reference_ms_deform_attn
from plugins import torch_op
from tests.plugins import cases
from tests.plugins.cases import CASES, WRONG, Case

needs_library = pytest.mark.skipif(
    torch_op.library() is None, reason="the native kernel is not built: python -m plugins.build"
)

RTOL_GRADIENT = 2e-5  # of the largest gradient; measured 1e-6
DIFFERENTIABLE = (0, 2, 3, 4)  # all but spatial_shapes
PATHS = ("avx512", "avx2", "portable")


def tensors(case: Case, dtype: type[np.floating] = np.float32) -> torch_op.Inputs:
    first, second, third, fourth, fifth = (torch.from_numpy(array) for array in case.draw(dtype).values())
    return first, second, third, fourth, fifth


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """A path of the CPU kernel, chosen for the test."""
    library = torch_op.library()
    if library is None:
        pytest.skip("the native kernel is not built: python -m plugins.build")
    best = library.msda_cpu_path()
    if library.msda_set_cpu_path(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    assert library.msda_cpu_path().decode() == request.param
    yield request.param
    library.msda_set_cpu_path(best)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.usefixtures("path")
def test_every_case_on_every_path(dtype: type[np.floating]) -> None:
    for case in CASES:
        inputs = case.draw(dtype)
        assert torch_op.serves(tensors(case, dtype))
        cases.check(ms_deform_attn(*map(torch.from_numpy, inputs.values())).numpy(), inputs)


@pytest.mark.usefixtures("path")
@settings(max_examples=40, deadline=None)
@given(cases.any_case())
def test_any_case_on_every_path(case: Case) -> None:
    for dtype in (np.float32, np.float16):
        inputs = case.draw(dtype)
        cases.check(torch_op.forward(tensors(case, dtype)).numpy(), inputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_in_plain_pytorch(case: Case) -> None:
    cases.check(reference_ms_deform_attn(*tensors(case)).numpy(), case.draw())


@pytest.mark.parametrize("what", WRONG)
def test_wrong_shapes_are_errors_that_say_which(what: str) -> None:
    inputs, message = cases.spoiled(what)
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*map(torch.from_numpy, inputs.values()))


@needs_library
@pytest.mark.parametrize("name", ["as in r50", "as embedded", "odd D", "rows and columns", "one level", "border"])
@pytest.mark.parametrize("sides", [2, 4])
def test_gradients(name: str, sides: int) -> None:
    case = next(each for each in CASES if each.name == f"{name}, R={sides}")
    results = []
    for function in (reference_ms_deform_attn, ms_deform_attn):
        leaves = [tensor.requires_grad_(i in DIFFERENTIABLE) for i, tensor in enumerate(tensors(case))]
        output = function(*leaves)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        results.append([leaves[i].grad for i in DIFFERENTIABLE])
    for place, mine, theirs in zip(DIFFERENTIABLE, results[1], results[0], strict=True):
        if name == "border" and place in (2, 3):
            continue  # on a pixel's centre the slope is that of either side
        assert mine is not None
        assert theirs is not None
        error = (mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)
        assert error < RTOL_GRADIENT, f"gradient of input {place}"


def test_gradients_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_op, "library", lambda: None)
    leaves = [t.requires_grad_(i in DIFFERENTIABLE) for i, t in enumerate(tensors(CASES[0]))]
    assert not torch_op.serves(tensors(CASES[0]))
    wanted = torch.autograd.grad(reference_ms_deform_attn(*leaves).sum(), [leaves[i] for i in DIFFERENTIABLE])
    got = torch.autograd.grad(ms_deform_attn(*leaves).sum(), [leaves[i] for i in DIFFERENTIABLE])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, wanted, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_it_is_what_pytorch_asks_of_an_op(dtype: type[np.floating]) -> None:
    small = Case("small", levels=((3, 4), (2, 2)), batch=2, queries=5, heads=2, channels=8, points=2)
    inputs = [t.requires_grad_(i in DIFFERENTIABLE) for i, t in enumerate(tensors(small, dtype))]
    torch.library.opcheck(torch.ops.msda.ms_deform_attn.default, tuple(inputs), atol=1e-3, rtol=1e-2)


@needs_library
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_of_narrow_inputs_output_and_gradients_are_narrow(narrow: torch.dtype) -> None:
    value, shapes, reference, offsets, logits = tensors(CASES[0])
    value, offsets, logits = (t.to(narrow).requires_grad_() for t in (value, offsets, logits))
    output = ms_deform_attn(value, shapes, reference, offsets, logits)
    wide = ms_deform_attn(value.float(), shapes, reference, offsets.float(), logits.float())
    assert output.dtype == narrow
    torch.testing.assert_close(output, wide.to(narrow), atol=1e-3, rtol=1e-2)
    output.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == narrow for t in (value, offsets, logits))


def test_wide_inputs_stay_wide() -> None:
    value, shapes, reference, offsets, logits = tensors(CASES[0])
    inputs = (value.double(), shapes, reference.double(), offsets.double(), logits.double())
    assert not torch_op.serves(inputs)
    torch.testing.assert_close(ms_deform_attn(*inputs), torch.from_numpy(cases.answer(CASES[0].draw())))


@needs_library
def test_any_number_of_threads_gives_the_same_bits() -> None:
    inputs = tensors(Case("three blocks and some", batch=2, queries=301))
    inputs[0].requires_grad_()
    threads = torch.get_num_threads()
    answers = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            output = ms_deform_attn(*inputs)
            answers.append((output, torch.autograd.grad(output.square().sum(), inputs[0])[0]))
    finally:
        torch.set_num_threads(threads)
    for output, gradient in answers[1:]:
        assert torch.equal(output, answers[0][0])
        assert torch.equal(gradient, answers[0][1])


@needs_library
def test_strided_inputs() -> None:
    inputs = tensors(CASES[0])
    strided = [t.movedim(0, -1).contiguous().movedim(-1, 0) if t.is_floating_point() else t for t in inputs]
    assert not strided[0].is_contiguous() or inputs[0].shape[0] == 1
    doubled = [t.repeat_interleave(2, -1)[..., ::2] for t in inputs]
    assert torch.equal(ms_deform_attn(*strided), ms_deform_attn(*inputs))
    assert torch.equal(ms_deform_attn(*doubled), ms_deform_attn(*inputs))


@needs_library
def test_more_points_than_its_arrays_hold_go_to_pytorch() -> None:
    case = Case("too many", levels=((4, 4),), points=torch_op.MAX_LEVEL_POINTS + 1, channels=2, heads=1)
    inputs = tensors(case)
    assert not torch_op.serves(inputs)
    cases.check(ms_deform_attn(*inputs).numpy(), case.draw())
    with pytest.raises(RuntimeError, match=f"refused S=16, L=1, P={torch_op.MAX_LEVEL_POINTS + 1}"):
        torch_op.forward(inputs)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_places_beyond_two_to_the_31(dtype: type[np.floating]) -> None:
    """The last rows of arrays of more elements than 32 bits count, of which only the last image is there to be read."""
    images, last, queries = 5_000_000, 4_999_999, 60
    case = Case("the last image", levels=((6, 8),), queries=queries, heads=2, channels=16)
    inputs = case.draw(dtype)
    output = np.zeros((1, queries, 32), dtype)
    view = torch_op.params(tensors(case, dtype))
    view.batch = images
    held = {"value": inputs["value"], "reference_points": inputs["reference_points"]}
    held |= {name: inputs[name] for name in ("sampling_offsets", "attention_logits")}
    assert all(array.size * images > 2**31 for name, array in held.items() if name != "reference_points")
    for name, array in held.items():
        setattr(view, name, array.ctypes.data - last * array.nbytes)
    library = torch_op.library()
    assert library is not None
    library.msda_forward_rows.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    rows = images * queries
    where = output.ctypes.data - last * output.nbytes
    assert library.msda_forward_rows(ctypes.byref(view), rows - queries, rows, where) == 0
    cases.check(output, inputs)
