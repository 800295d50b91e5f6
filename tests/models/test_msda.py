"""The op's reference: cases done by hand in float64, a naive loop, and derivatives by difference."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.msda import ms_deform_attn, reference_ms_deform_attn, sampling_locations

ATOL_FLOAT64 = 1e-12


def naive(value: Tensor, shapes: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """The paper's equation 3, one number after the other: [N, Lq, M*D]."""
    n_, _, m_, d_ = value.shape
    q_, l_, p_ = offsets.shape[1], offsets.shape[3], offsets.shape[4]
    output = torch.zeros(n_, q_, m_, d_, dtype=value.dtype)
    for n, q, m in product(range(n_), range(q_), range(m_)):
        exponentials = [math.exp(float(x)) for x in logits[n, q, m]]
        start = 0
        for level in range(l_):
            h, w = (int(side) for side in shapes[level])
            for p in range(p_):
                box = [float(x) for x in reference[n, q, level]]
                dx, dy = (float(x) for x in offsets[n, q, m, level, p])
                if len(box) == 2:
                    x, y = box[0] * w + dx, box[1] * h + dy
                else:
                    x, y = (box[0] + dx / p_ * box[2] / 2) * w, (box[1] + dy / p_ * box[3] / 2) * h
                weight = exponentials[level * p_ + p] / sum(exponentials)
                x, y = x - 0.5, y - 0.5  # pixel centres on whole numbers
                for i, j in product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
                    if 0 <= i < h and 0 <= j < w:
                        share = (1 - abs(y - i)) * (1 - abs(x - j))
                        output[n, q, m] += weight * share * value[n, start + i * w + j, m]
            start += h * w
    return output.flatten(2)


def sample(
    plane: list[list[float]], point: tuple[float, ...], offset: tuple[float, float] = (0.0, 0.0), points: int = 1
) -> float:
    """One head, one channel, one level; all points at the same place."""
    value = torch.tensor(plane, dtype=torch.float64)
    h, w = value.shape
    answer = reference_ms_deform_attn(
        value.view(1, h * w, 1, 1),
        torch.tensor([[h, w]]),
        torch.tensor(point, dtype=torch.float64).view(1, 1, 1, -1),
        torch.tensor([offset] * points, dtype=torch.float64).view(1, 1, 1, 1, points, 2),
        torch.zeros(1, 1, 1, points, dtype=torch.float64),
    )
    return float(answer)


PLANE = [[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]]  # h=2, w=4: centres at x = 1/8, 3/8, 5/8, 7/8; y = 1/4, 3/4


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ((3 / 8, 1 / 4), 2.0),  # on a pixel
        ((7 / 8, 3 / 4), 40.0),  # on the last pixel
        ((4 / 8, 1 / 4), 2.5),  # midway between two
        ((3 / 8, 2 / 4), 11.0),  # midway down
        ((4 / 8, 2 / 4), 13.75),  # between four
        ((0.0, 1 / 4), 0.5),  # on the border: half the pixel, half the zero outside
        ((0.0, 0.0), 0.25),  # in the corner: a quarter
        ((1.0, 3 / 4), 20.0),
        ((-1 / 8, 1 / 4), 0.0),  # a whole pixel outside
        ((1 / 8, 1.5), 0.0),
        ((9.0, -9.0), 0.0),
    ],
)
def test_a_point_samples_bilinearly_with_zeros_outside(point: tuple[float, float], expected: float) -> None:
    assert sample(PLANE, point) == pytest.approx(expected, abs=ATOL_FLOAT64)


def test_around_a_point_an_offset_counts_pixels_of_its_level() -> None:
    assert sample(PLANE, (1 / 8, 1 / 4), offset=(2.0, 1.0)) == pytest.approx(30.0, abs=ATOL_FLOAT64)
    assert sample(PLANE, (1 / 8, 1 / 4), offset=(0.5, 0.0)) == pytest.approx(1.5, abs=ATOL_FLOAT64)


def test_around_a_box_an_offset_counts_half_boxes_over_the_points() -> None:
    # Centre (3/8, 1/4), w = 1/2, h = 1/2: with 4 points an offset of 4 goes half a box, 1/4 of the width, one pixel.
    assert sample(PLANE, (3 / 8, 1 / 4, 1 / 2, 1 / 2), (4.0, 0.0), points=4) == pytest.approx(3.0, abs=ATOL_FLOAT64)
    assert sample(PLANE, (3 / 8, 1 / 4, 1 / 2, 1.0), (0.0, 4.0), points=4) == pytest.approx(20.0, abs=ATOL_FLOAT64)
    assert sample(PLANE, (3 / 8, 1 / 4, 1 / 2, 1.0), (0.0, 1.0), points=1) == pytest.approx(20.0, abs=ATOL_FLOAT64)


def test_a_box_of_twice_the_points_in_pixels_is_a_point() -> None:
    shapes = torch.tensor([[6, 4], [3, 2]])
    points, offsets = torch.rand(2, 5, 2, 2), torch.randn(2, 5, 3, 2, 4, 2)
    wh = (2 * 4 / shapes.flip(-1)).expand(2, 5, 2, 2)
    as_points = sampling_locations(shapes, points, offsets)
    torch.testing.assert_close(sampling_locations(shapes, torch.cat([points, wh], -1), offsets), as_points)


def test_weights_are_a_softmax_over_levels_and_points() -> None:
    value = torch.tensor([5.0, 70.0], dtype=torch.float64).view(1, 2, 1, 1)  # two levels of one pixel
    shapes = torch.tensor([[1, 1], [1, 1]])
    centre = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    logits = torch.tensor([math.log(3), 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    answer = reference_ms_deform_attn(value, shapes, centre, torch.zeros(1, 1, 1, 2, 1, 2).double(), logits)
    assert float(answer) == pytest.approx(0.75 * 5 + 0.25 * 70, abs=ATOL_FLOAT64)


def test_levels_and_heads_keep_apart() -> None:
    value = torch.arange(1.0, 13.0, dtype=torch.float64).view(1, 6, 2, 1)  # level 0: 2x2, level 1: 1x2; two heads
    shapes = torch.tensor([[2, 2], [1, 2]])
    centre = torch.tensor([[0.25, 0.75], [0.75, 0.5]], dtype=torch.float64).view(1, 1, 2, 2)  # pixels (1, 0), (0, 1)
    logits = torch.tensor([[0.0, 0.0], [0.0, -1e9]], dtype=torch.float64).view(1, 1, 2, 2)
    answer = reference_ms_deform_attn(value, shapes, centre, torch.zeros(1, 1, 2, 2, 1, 2).double(), logits)
    # Head 0 has odd numbers: pixel 2 is 5, pixel 5 is 11, half each. Head 1 (even) looks at level 0 alone.
    torch.testing.assert_close(answer, torch.tensor([[[8.0, 6.0]]], dtype=torch.float64))


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def drawn(
    shapes: list[tuple[int, int]], sides: int, *, batch: int = 2, heads: int = 2, points: int = 2, seed: int = 0
) -> Inputs:
    """Random inputs in float64 whose samples lie in and around the levels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    queries, levels, channels = 3, len(shapes), 3
    reference = torch.rand(batch, queries, levels, sides, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    return (
        normal(batch, sum(h * w for h, w in shapes), heads, channels),
        torch.tensor(shapes),
        reference,
        2 * normal(batch, queries, heads, levels, points, 2),
        3 * normal(batch, queries, heads, levels * points),
    )


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    sides=st.sampled_from([2, 4]),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    points=st.integers(1, 3),
    seed=st.integers(0, 2**31 - 1),
)
def test_equals_the_naive_loop(
    shapes: list[tuple[int, int]], sides: int, batch: int, heads: int, points: int, seed: int
) -> None:
    inputs = drawn(shapes, sides, batch=batch, heads=heads, points=points, seed=seed)
    torch.testing.assert_close(reference_ms_deform_attn(*inputs), naive(*inputs), atol=1e-10, rtol=0)


@pytest.mark.parametrize("sides", [2, 4])
def test_derivatives(sides: int) -> None:
    value, shapes, reference, offsets, logits = drawn([(3, 4), (2, 2)], sides, seed=5)
    inputs = [tensor.requires_grad_() for tensor in (value, reference, offsets, logits)]
    assert torch.autograd.gradcheck(
        lambda v, r, o, a: reference_ms_deform_attn(v, shapes, r, o, a), inputs, eps=1e-7, atol=1e-5, fast_mode=False
    )


def test_half_precision_values_keep_float32_locations() -> None:
    inputs = drawn([(90, 160)], 2)
    value, shapes, reference, offsets, logits = inputs
    half = (value.half(), shapes, reference.float(), offsets.half(), logits.half())
    answer = reference_ms_deform_attn(*half)
    assert answer.dtype == torch.float16
    wanted = naive(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in half))
    torch.testing.assert_close(answer.double(), wanted, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (2, 12, 6), r"value must be \[N, S, M, D\]"),
        (1, (2, 3), r"spatial_shapes must be \[L, 2\]"),
        (2, (2, 3, 1, 3), r"reference_points must be \[2, 3, 1, 2 or 4\], got \[2, 3, 1, 3\]"),
        (2, (2, 9, 1, 2), r"reference_points must be"),
        (3, (2, 3, 2, 1, 2), r"sampling_offsets must be \[N, Lq, M, L, P, 2\]"),
        (3, (2, 3, 2, 1, 2, 3), r"sampling_offsets must be \[2, 3, 2, 1, 2, 2\]"),
        (4, (2, 3, 2, 5), r"attention_logits must be \[2, 3, 2, 2\], got \[2, 3, 2, 5\]"),
    ],
)
def test_a_wrong_shape_is_named(place: int, shape: tuple[int, ...], message: str) -> None:
    inputs = list(drawn([(3, 4)], 2))
    inputs[place] = torch.zeros(shape, dtype=inputs[place].dtype)
    with pytest.raises(ValueError, match=message):
        reference_ms_deform_attn(*inputs)
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*inputs)


def test_levels_that_do_not_cover_the_value_are_an_error() -> None:
    value, _, *rest = drawn([(3, 4)], 2)
    with pytest.raises(ValueError, match=r"level 0 of spatial_shapes, \[3, 5\], reaches beyond the 12 pixels of value"):
        reference_ms_deform_attn(value, torch.tensor([[3, 5]]), *rest)
