"""One table of cases for every backend of the op, and the answer to each in float64, as plainly as the formula.

Axes: N batch, S = sum of h_l*w_l, M heads, D channels of a head, Lq queries, L levels, P points of a level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[np.generic]
Arrays = dict[str, Array]  # the five inputs by name, in their order

PYRAMID = ((12, 16), (6, 8), (3, 4), (2, 2))
NAN, INF = float("nan"), float("inf")

# Of answers of order one. float32: locations are rounded, at a 40 px side to some 4e-6 px; measured 1.4e-5.
ATOL = {np.dtype(np.float32): 2e-5, np.dtype(np.float16): 2e-3}
RTOL = {np.dtype(np.float32): 0.0, np.dtype(np.float16): 1e-3}  # half a unit in the last place of the output


@dataclass(frozen=True)
class Case:
    """What to draw inputs from. `place` puts all samples somewhere; `poison` (input, value) spoils the first query."""

    name: str
    levels: tuple[tuple[int, int], ...] = PYRAMID  # (h, w)
    batch: int = 1
    queries: int = 50
    heads: int = 8
    channels: int = 32
    points: int = 4
    sides: int = 2  # R of the reference points
    place: str = "about"  # "about" the level and a little outside, "border", "corner", "outside", "far"
    poison: tuple[str, float] | None = None
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    def draw(self, dtype: type[np.floating] = np.float32) -> Arrays:
        """The inputs; value, sampling_offsets and attention_logits of `dtype`."""
        random = np.random.default_rng([self.seed, self.sides, self.batch, self.channels, self.points])

        def normal(*size: int) -> NDArray[np.float32]:
            return random.standard_normal(size, np.float32)

        n, queries, heads, levels, points = self.batch, self.queries, self.heads, len(self.levels), self.points
        reference = random.random((n, queries, levels, self.sides), np.float32) * np.float32(1.2) - np.float32(0.1)
        offsets = 3 * normal(n, queries, heads, levels, points, 2)
        if self.place != "about":
            reference[..., :2], offsets = self._placed(random)
        inputs: Arrays = {
            "value": normal(n, sum(h * w for h, w in self.levels), heads, self.channels).astype(dtype),
            "spatial_shapes": np.array(self.levels, np.int64).reshape(levels, 2),
            "reference_points": reference,
            "sampling_offsets": offsets.astype(dtype),
            "attention_logits": (2 * normal(n, queries, heads, levels * points)).astype(dtype),
        }
        if self.poison is not None and n and queries:
            name, bad = self.poison
            inputs[name][0, 0] = bad
        return inputs

    def _placed(self, random: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Reference points without offsets: on pixels' centres at the border, beyond it, or nowhere near."""
        n, queries, levels = self.batch, self.queries, len(self.levels)
        steps = {"border": (-1, -0.5, 0), "corner": (-0.5, 0, 0.5, 1), "outside": (-1, -1.5, -9), "far": (-1e8, 1e30)}
        w_h = np.array(self.levels, np.float64)[:, ::-1]
        inward = random.choice(steps[self.place], (n, queries, levels, 2))  # px from the outermost centre
        near = (inward + 0.5) / w_h
        located = np.where(random.random(inward.shape) < 0.5, near, 1 - near)
        if self.place == "border":  # only one coordinate on it
            free = random.random(inward.shape)
            located = np.where(random.random((n, queries, levels, 1)) < [[0.5, 2]], located, free)
        return located.astype(np.float32), np.zeros((n, queries, self.heads, levels, self.points, 2), np.float32)


def _both(case: Case) -> tuple[Case, Case]:
    return replace(case, name=f"{case.name}, R=2", sides=2), replace(case, name=f"{case.name}, R=4", sides=4)


CASES: tuple[Case, ...] = (
    *_both(Case("as in r50")),
    *_both(Case("a batch", batch=3, channels=16)),
    *_both(Case("as embedded", batch=2, channels=16, points=3)),
    *_both(Case("P=6", points=6)),
    *_both(Case("one level", levels=((9, 11),), points=6)),
    *_both(Case("1x1 levels", levels=((1, 1), (1, 1)), points=2)),
    *_both(Case("one pixel, one of each", levels=((1, 1),), points=1, heads=1, queries=1, channels=1)),
    *_both(Case("rows and columns", levels=((1, 7), (5, 1)), batch=3, queries=301, heads=2)),
    *_both(Case("odd D", channels=7, heads=3)),
    *_both(Case("D=8", channels=8, heads=2)),
    *_both(Case("D=24", channels=24, heads=2)),
    *_both(Case("D=64", channels=64, heads=2)),
    *_both(Case("D=130", channels=130, heads=2, queries=9)),
    *_both(Case("as many points as there may be", points=64, queries=5)),
    *_both(Case("many levels", levels=tuple((k, 9 - k) for k in range(1, 9)), heads=2, channels=16)),
    *_both(Case("big N", batch=70, queries=3, heads=2, channels=8, levels=((3, 4), (2, 2)))),
    *_both(Case("an encoder", levels=((30, 40), (15, 20)), queries=1500, heads=2)),
    *(Case(f"N={n} Lq={q} M={m} D={d}", batch=n, queries=q, heads=m, channels=d)
      for n, q, m, d in ((0, 50, 8, 32), (1, 0, 8, 32), (1, 50, 0, 32), (1, 50, 8, 0))),
    *(each for place in ("border", "corner", "outside", "far") for each in _both(Case(place, place=place))),
    *(each
      for name in ("reference_points", "sampling_offsets", "attention_logits")
      for bad in (NAN, INF, -INF, 3e4)
      for each in _both(Case(f"{bad} in {name}", batch=2, queries=5, poison=(name, bad)))),
    *(Case(f"{bad} in value", batch=2, queries=200, poison=("value", bad)) for bad in (NAN, INF, -INF)),
)  # fmt: skip


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    """For property testing: small inputs of any shape."""
    side = st.integers(1, 9)
    levels = draw(st.lists(st.tuples(side, side), min_size=1, max_size=5))
    return Case(
        "drawn",
        levels=tuple(levels),
        batch=draw(st.integers(0, 3)),
        queries=draw(st.integers(0, 20)),
        heads=draw(st.integers(1, 9)),
        channels=draw(st.integers(1, 40) | st.sampled_from((64, 96, 128))),
        points=draw(st.integers(1, 8)),
        sides=draw(st.sampled_from((2, 4))),
        place=draw(st.sampled_from(("about", "about", "border", "corner", "outside"))),
        seed=draw(st.integers(0, 1 << 20)),
    )


def answer(inputs: Arrays) -> NDArray[np.float64]:
    """The op in float64: sum over levels and points of A * the bilinear sample at phi_l(p) + offset, [N, Lq, M*D].

    A location that is not a number is nowhere: its sample is zero.
    """
    value, reference, offsets, logits = (
        inputs[name].astype(np.float64)
        for name in ("value", "reference_points", "sampling_offsets", "attention_logits")
    )
    n, _, heads, channels = value.shape
    queries, points = offsets.shape[1], offsets.shape[4]
    with np.errstate(all="ignore"):
        exponentials = np.exp(logits - logits.max(-1, keepdims=True, initial=-INF))
        attention = exponentials / exponentials.sum(-1, keepdims=True)  # [N, Lq, M, L*P]
    output = np.zeros((n, queries, heads, channels))
    image = np.arange(n)[:, None, None]
    head = np.arange(heads)[None, None, :]
    start = 0
    for level, (h, w) in enumerate(inputs["spatial_shapes"].tolist()):
        for point in range(points):
            where = reference[:, :, None, level]  # [N, Lq, 1, R]
            offset = offsets[:, :, :, level, point]  # [N, Lq, M, 2]
            with np.errstate(all="ignore"):
                if where.shape[-1] == 2:
                    location = where + offset / np.array([w, h])
                else:
                    location = where[..., :2] + offset / points * where[..., 2:] * 0.5
                x, y = location[..., 0] * w - 0.5, location[..., 1] * h - 0.5  # px from the first pixel's centre
                x0, y0 = np.floor(x), np.floor(y)
                sample = np.zeros_like(output)
                for row, up in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
                    for column, left in ((x0, 1 - (x - x0)), (x0 + 1, x - x0)):
                        inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
                        pixel = start + np.where(inside, row * w + column, 0).astype(np.int64)
                        sample += np.where(inside, up * left, 0)[..., None] * np.where(
                            inside[..., None], value[image, pixel, head], 0
                        )
                output += attention[..., level * points + point, None] * sample
        start += h * w
    return output.reshape(n, queries, heads * channels)


def check(got: Array, inputs: Arrays, tolerance: tuple[float, float] | None = None) -> float:
    """Raise an AssertionError where an answer is not the op's; return the largest error there was.

    The tolerance, absolute and relative, is that of value's type unless it is given (bfloat16: numpy has none).

    Numbers that are none must be so in the same queries; which of a query's channels, hangs on the order of sums.
    """
    wanted = answer(inputs)
    dtype = inputs["value"].dtype
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    got = got.astype(np.float64)
    heads = inputs["value"].shape[2]
    if got.size == 0:
        return 0.0
    by_head = (*got.shape[:2], heads, -1)
    sound = np.isfinite(wanted).reshape(by_head).all(-1)
    assert np.array_equal(np.isfinite(got).reshape(by_head).all(-1), sound), "other queries than expected are spoiled"
    mine, theirs = got.reshape(by_head)[sound], wanted.reshape(by_head)[sound]
    atol, rtol = tolerance or (ATOL[dtype], RTOL[dtype])
    np.testing.assert_allclose(mine, theirs, atol=atol, rtol=rtol)
    return float(np.abs(mine - theirs).max(initial=0.0))


# What is wrong: the input, how it is spoiled (from N=2, Lq=5, M=8, L=4, P=4), and what the error says.
WRONG: dict[str, tuple[str, Callable[[Array], Array], str]] = {
    "value of rank 3": ("value", lambda a: a[0], r"value must be \[N, S, M, D\], got \[256, 8, 32\]|rank"),
    "fewer heads": ("value", lambda a: a[:, :, :7], r"sampling_offsets must be \[2, 5, 7, 4, 4, 2\], got \[2, 5, 8"),
    "another batch": ("value", lambda a: a[:1], r" must be \[1, 5, .*, got \[2, 5, "),
    "a pixel too few": ("value", lambda a: a[:, 1:], r"spatial_shapes.* 255"),
    "a level too few": ("spatial_shapes", lambda a: a[:3], r" must be \[2, 5, .*3, .*, got \[2, 5, .*4, "),
    "no level": ("spatial_shapes", lambda a: a[:0], r"L=0 levels of P=4 points"),
    "three sides": ("spatial_shapes", lambda a: np.c_[a, a[:, :1]], r"spatial_shapes must be \[.*, 2\], got \[4, 3\]"),
    "a side of zero": ("spatial_shapes", lambda a: a * [[1, 1], [1, 1], [0, 1], [1, 1]], r"level 2 .* is \[0, 4\]"),
    "negative sides": ("spatial_shapes", lambda a: -a, r"level 0 .* is \[-12, -16\], sides must be positive"),
    "sides that overflow": ("spatial_shapes", lambda a: a << 40, r"spatial_shapes.* \[?\[13194139533312, "),
    "smaller levels": ("spatial_shapes", lambda a: np.maximum(a - 1, 1), r"cover 207 pixels, value has 256"),
    "boxes of 3 sides": ("reference_points", lambda a: np.r_["-1", a, a[..., :1]], r"2 or 4\], got \[2, 5, 4, 3\]"),
    "more queries": ("reference_points", lambda a: np.r_["1", a, a], r"must be \[2, 5, 4, 2.*\], got \[2, 10, 4, 2\]"),
    "three coordinates": ("sampling_offsets", lambda a: np.r_["-1", a, a[..., :1]], r"got \[2, 5, 8, 4, 4, 3\]"),
    "no point": ("sampling_offsets", lambda a: a[..., :0, :], r"P=0 points"),
    "fewer weights": ("attention_logits", lambda a: a[..., 1:], r"must be \[2, 5, 8, 16\], got \[2, 5, 8, 15\]"),
}
WRONG_CASE = Case("to be spoiled", batch=2, queries=5)


def spoiled(what: str, dtype: type[np.floating] = np.float32) -> tuple[Arrays, str]:
    """Inputs of which one is wrong, and a pattern of the error to expect."""
    name, spoil, message = WRONG[what]
    inputs = WRONG_CASE.draw(dtype)
    return inputs | {name: np.ascontiguousarray(spoil(inputs[name]))}, message
