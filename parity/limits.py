"""How far an engine may be from float32 PyTorch, by the precision it computes in."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

MEASURED = ("box_median", "score_median", "curve")
"""Figures whose limits in half precision and in integers follow what these were measured to do in the network."""
HALF_FACTOR = 4.0
"""Limits in half precision over what was measured: a GPU's kernels round elsewhere, and may add up in half. ONNX
Runtime is at 0.8 of the measurement."""
INT8_FACTOR = 1.5
"""Limits in integers over what was measured of the very graph that is served: by another kernel of the op, with other
optimisations, threads and batch sizes it was within 1.05."""
ALONE = 3.0
"""What one picture may be over the limit of the median picture: where a proposal is swapped for one as good, all other
detections of its picture move a little."""

SIGNATURE = 0.25
"""Limit, in every precision, of how much of a known fault is in the box errors. Measured: right engines, of float32 and
of half precision, at most 0.05; engines with the fault 0.44 and more."""


@dataclass(frozen=True)
class Limits:
    """Limits of the figures of `parity.compare.Figures`; boxes in shares of the image's side.

    An engine's detection and one of PyTorch are a pair when their labels are equal, their scores differ by at most
    `pair_score`, and their boxes have an IoU of `pair_iou` or differ by at most `pair_box`. `strays` is the share of
    the detections that may be without a partner, `least_strays` how many may whatever their share. Those below
    `least_score` do not count. `box_median`, `score_median` and `curve` are the limits of the median picture of a
    canvas and batch size; one picture alone may have `ALONE` times as much.
    """

    precision: str
    pair_iou: float
    pair_box: float
    pair_score: float
    strays: float
    box_median: float
    score_median: float
    curve: float
    least_strays: int = 0
    least_score: float = 0.0


LIMITS = {
    # Two float32 engines differ by the order of their sums: measured at most 1e-6 of the side and 2e-5 of a score. A
    # GPU's fused and reordered sums get a margin of ten and more; sampling locations in half move the median by 1e-4.
    "fp32": Limits(
        "fp32", pair_iou=1.0, pair_box=2e-4, pair_score=1e-3, strays=0.0,
        box_median=5e-6, score_median=2e-5, curve=5e-5,
    ),
    # Measured: worst pair 7e-4 of the side and 2e-2 of a score; a two-stage network takes in another proposal where two
    # are nearly as good, so some are without a partner. The medians' limits are those of a proof that has no measure.
    "fp16": Limits(
        "fp16", pair_iou=0.9, pair_box=5e-3, pair_score=5e-2, strays=0.08,
        box_median=1e-4, score_median=1e-3, curve=2e-3, least_strays=1,
    ),
    # Eight bits move weak detections about, but strong ones stay where they are. The medians' limits are those of a
    # graph that has no measure, as when it is made. Embedded model, four sets of calibration pictures: box 1.2e-3 to
    # 1.9e-3, score 0.008 to 0.014, curve 0.005 to 0.009, strays 0 to 2 of 18 and more. AP is what decides then.
    "int8": Limits(
        "int8", pair_iou=0.6, pair_box=1e-2, pair_score=0.25, strays=0.2,
        box_median=8e-3, score_median=0.05, curve=0.03, least_strays=3, least_score=0.3,
    ),
}  # fmt: skip
LIMITS["tf32"] = replace(LIMITS["fp16"], precision="tf32")  # what goes into its products has half precision's 10 bits
FLOORS = {"box_median": 1e-5, "score_median": 5e-5, "curve": 1e-4}
"""The least that such a limit is, where almost nothing was measured."""


def limits_for(precision: str, measured: Mapping[str, float] | None = None) -> Limits:
    """The limits of a precision ("fp32", "tf32", "fp16", "int8"); raises ValueError for another.

    measured: `Proof.half`, of int8 `Proof.integers`. Those of fp32 follow nothing. Of int8 no more is believed than a
    graph may do when it is made: a graph's own noise excuses none that is worse.
    """
    if precision not in LIMITS:
        raise ValueError(f"no limits for precision {precision!r}; there are {', '.join(LIMITS)}")
    limits = LIMITS[precision]
    if precision == "fp32" or not measured:
        return limits
    followed = {}
    for name in MEASURED:
        found, limit = measured.get(name, 0.0), getattr(limits, name)
        limit = INT8_FACTOR * min(found, limit) if precision == "int8" else HALF_FACTOR * found
        followed[name] = max(FLOORS[name], limit)
    return replace(limits, **followed)  # type: ignore[arg-type]  # they are all floats


AP_LOSS = {"fp32": 0.002, "tf32": 0.005, "fp16": 0.005, "int8": 0.01}
"""How much AP a precision may cost on data."""
