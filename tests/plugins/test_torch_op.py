"""The native CPU kernel against the op's reference: answers and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.msda import ms_deform_attn, reference_ms_deform_attn
from plugins import torch_op

needs_library = pytest.mark.skipif(
    torch_op.library() is None, reason="the native kernel is not built: python -m plugins.build"
)

ATOL_FORWARD = 5e-6  # of values of order one; measured 7e-7
RTOL_GRADIENT = 2e-5  # of the largest gradient; measured 1e-6
PYRAMID = [(12, 16), (6, 8), (3, 4), (2, 2)]


def drawn(
    shapes: list[tuple[int, int]] = PYRAMID, sides: int = 2, channels: int = 32, points: int = 4, heads: int = 8
) -> list[Tensor]:
    """Random float32 inputs for two pictures and 50 queries; some samples lie outside."""
    generator = torch.Generator().manual_seed(sides * 1000 + channels)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    n, queries, levels = 2, 50, len(shapes)
    reference = torch.rand(n, queries, levels, sides, generator=generator) * 1.2 - 0.1
    return [
        normal(n, sum(h * w for h, w in shapes), heads, channels),
        torch.tensor(shapes),
        reference,
        3 * normal(n, queries, heads, levels, points, 2),
        2 * normal(n, queries, heads, levels * points),
    ]


@needs_library
@pytest.mark.parametrize("sides", [2, 4])
@pytest.mark.parametrize("channels", [16, 32, 20, 1])  # two have code of their own, the others share one
@pytest.mark.parametrize("shapes", [PYRAMID, [(1, 1)], [(1, 7), (5, 1)]])
def test_answers_and_gradients(sides: int, channels: int, shapes: list[tuple[int, int]]) -> None:
    inputs = drawn(shapes, sides, channels)
    places = (0, 2, 3, 4)  # all but spatial_shapes
    results = []
    for function in (reference_ms_deform_attn, torch_op.ms_deform_attn):
        leaves = [tensor.clone().requires_grad_(i in places) for i, tensor in enumerate(inputs)]
        output = function(*leaves)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        results.append((output.detach(), [leaves[i].grad for i in places]))
    (wanted, wanted_gradients), (got, got_gradients) = results
    torch.testing.assert_close(got, wanted, atol=ATOL_FORWARD, rtol=0)
    for place, mine, theirs in zip(places, got_gradients, wanted_gradients, strict=True):
        error = (mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)
        assert error < RTOL_GRADIENT, f"gradient of input {place}"


@needs_library
def test_the_network_uses_it_where_it_serves() -> None:
    inputs = drawn()
    assert torch_op.serves(inputs[0], inputs[2], inputs[3])
    torch.testing.assert_close(ms_deform_attn(*inputs), torch_op.ms_deform_attn(*inputs), atol=0, rtol=0)
    assert not torch_op.serves(inputs[0].double(), inputs[2], inputs[3])


@needs_library
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_narrow_inputs_are_widened_and_the_output_is_of_their_type(narrow: torch.dtype) -> None:
    value, shapes, reference, offsets, logits = drawn()
    value, offsets, logits = (t.to(narrow).requires_grad_() for t in (value, offsets, logits))
    assert torch_op.serves(value, reference, offsets)
    output = ms_deform_attn(value, shapes, reference, offsets, logits)
    wide = ms_deform_attn(value.float(), shapes, reference, offsets.float(), logits.float())
    assert output.dtype == narrow
    assert torch.equal(output, wide.to(narrow))
    output.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == narrow for t in (value, offsets, logits))


@needs_library
def test_any_number_of_threads_gives_the_same_bits() -> None:
    inputs = drawn()
    before = torch.get_num_threads()
    try:
        answers = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(torch_op.ms_deform_attn(*inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@needs_library
def test_strided_inputs() -> None:
    inputs = drawn()
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs]
    torch.testing.assert_close(torch_op.ms_deform_attn(*strided), torch_op.ms_deform_attn(*inputs), atol=0, rtol=0)


@needs_library
def test_more_points_than_its_arrays_hold_go_to_pytorch() -> None:
    inputs = drawn([(4, 4)], points=torch_op.MAX_LEVEL_POINTS + 1, channels=2, heads=1)
    assert not torch_op.serves(inputs[0], inputs[2], inputs[3])
    with pytest.raises(RuntimeError, match="P=257"):
        torch_op.ms_deform_attn(*inputs)
    torch.testing.assert_close(ms_deform_attn(*inputs), reference_ms_deform_attn(*inputs))


@needs_library
def test_what_is_not_a_number_stays_in_its_query() -> None:
    """A location that is not finite reads nothing: no fault, and no other query is touched."""
    inputs = drawn()
    wanted = torch_op.ms_deform_attn(*inputs)
    for bad in (float("nan"), float("inf"), -float("inf"), 1e30):
        broken = [tensor.clone() for tensor in inputs]
        broken[3][0, 0] = bad
        got = torch_op.ms_deform_attn(*broken)
        assert torch.equal(got[0, 1:], wanted[0, 1:])
        assert torch.equal(got[1], wanted[1])
        assert torch.equal(got[0, 0], torch.zeros_like(got[0, 0]))


def test_without_the_library_pytorch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_op, "library", lambda: None)
    inputs = drawn()
    assert not torch_op.serves(inputs[0], inputs[2], inputs[3])
    torch.testing.assert_close(ms_deform_attn(*inputs), reference_ms_deform_attn(*inputs), atol=0, rtol=0)
