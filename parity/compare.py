"""One picture's answer against the one expected: matched detections and raw figures."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parity.limits import Limits
from parity.proof import Expected

Array = NDArray[np.float32]
FARTHEST = 0.5
"""How far a box may stick out of its image: centre and sides are each in 0..1."""
SLACK = 1e-3  # of half precision in that sum
LEAST_BOXES = 20  # for a correlation that says something


@dataclass(frozen=True)
class Figures:
    """How one answer differs; boxes in shares of the image's side.

    faults: what cannot be an answer at all (then nothing else is measured). Of the pairs: worst and median error of box
    and score, least IoU. strays: detections without a partner, of the engine's or of PyTorch's, whichever are more.
    mislabelled: those of the engine's strays that pair once labels are left out. curve: the mean difference of the
    k-th best scores. compared: detections of PyTorch that had to be found; paired: those that were. counted: the
    detections that strays are a part of. signature: how much of a known fault, `fault`, is in the box errors,
    0 to 1.
    """

    faults: tuple[str, ...] = ()
    box_max: float = 0.0
    box_median: float = 0.0
    score_max: float = 0.0
    score_median: float = 0.0
    min_iou: float = 1.0
    curve: float = 0.0
    strays: int = 0
    mislabelled: int = 0
    compared: int = 0
    paired: int = 0
    counted: int = 0
    signature: float = 0.0
    fault: str = ""

    @property
    def agreement(self) -> float:
        """Share of PyTorch's detections that the engine has, too."""
        return self.paired / self.compared if self.compared else 1.0


@dataclass(frozen=True, eq=False)
class Answer:
    """An engine's answer to one picture: boxes [K, 4], scores [K], labels [K]."""

    boxes: Array
    scores: Array
    labels: NDArray[np.int64]


def compare(got: Answer, want: Expected, limits: Limits, detections: int, categories: Collection[int]) -> Figures:
    """The figures of one picture. `detections`: K. `categories`: the labels there are; empty: not checked."""
    if found := faults(got, detections, categories):
        return Figures(faults=found)
    pairs = match(got, want, limits)
    cut = float(want.scores[detections - 1]) if len(want.scores) >= detections else -1.0
    # A score at the cut, or at the least that counts, may fall on either side of it.
    least = min(limits.least_score, float(want.scores.max(initial=0.0)) / 2)  # there is always something to compare
    due = want.scores > max(cut + limits.pair_score if len(want.scores) > detections else -1.0, least)
    due[detections:] = False
    owed = got.scores > least + (limits.pair_score if limits.least_score else -1.0)
    partner_of_got = np.full(len(got.scores), -1)
    partner_of_got[pairs[:, 0]] = pairs[:, 1]
    found_of_want = np.zeros(len(want.scores), bool)
    found_of_want[pairs[:, 1]] = True
    missing = int((due & ~found_of_want).sum())
    lonely = owed & (partner_of_got < 0)
    counted = pairs[want.scores[pairs[:, 1]] >= least]
    box = np.abs(got.boxes[counted[:, 0]] - want.boxes[counted[:, 1]]).max(-1, initial=0.0)
    score = np.abs(got.scores[counted[:, 0]] - want.scores[counted[:, 1]])
    signature, fault = _signature(got, want, pairs)
    overlap = iou(got.boxes[counted[:, 0]], want.boxes[counted[:, 1]])
    return Figures(
        box_max=float(box.max(initial=0.0)),
        box_median=float(np.median(box)) if box.size else 0.0,
        score_max=float(score.max(initial=0.0)),
        score_median=float(np.median(score)) if score.size else 0.0,
        min_iou=float(overlap.min(initial=1.0)),
        curve=float(np.abs(got.scores - want.scores[: len(got.scores)]).mean()),
        strays=max(missing, int(lonely.sum())),
        mislabelled=_mislabelled(got, want, limits, lonely),
        compared=int(due.sum()),
        paired=int((due & found_of_want).sum()),
        counted=max(int(due.sum()), int(owed.sum())),
        signature=signature,
        fault=fault,
    )


def faults(got: Answer, detections: int, categories: Collection[int]) -> tuple[str, ...]:
    """What no right engine answers, each in some words: shape, type, finite, order, range, labels."""
    shapes = {"boxes": (detections, 4), "scores": (detections,), "labels": (detections,)}
    for name, shape in shapes.items():
        if (found := np.shape(getattr(got, name))) != shape:
            return (f"{name}: of shape {list(found)}, expected {list(shape)}",)
    types = {"boxes": np.float32, "scores": np.float32, "labels": np.int64}
    for name, type_ in types.items():
        if (dtype := getattr(got, name).dtype) != type_:
            return (f"{name}: of type {dtype}, expected {np.dtype(type_)}",)
    for name in ("boxes", "scores"):
        if wrong := int((~np.isfinite(getattr(got, name))).sum()):
            return (f"{name}: {wrong} not finite",)
    said = []
    if detections > 1 and (rise := float(np.diff(got.scores).max())) > 0:
        said.append(f"scores: not descending, one rises by {rise:.2g}")
    if got.scores.min(initial=0) < 0 or got.scores.max(initial=0) > 1:
        said.append(f"scores: from {got.scores.min():.3g} to {got.scores.max():.3g}, not in 0..1")
    low, high = -FARTHEST - SLACK, 1 + FARTHEST + SLACK
    if got.boxes.min(initial=0) < low or got.boxes.max(initial=0) > high:
        said.append(f"boxes: from {got.boxes.min():.3g} to {got.boxes.max():.3g}, not within half an image of it")
    if (inside_out := int((got.boxes[:, 2:] < got.boxes[:, :2] - SLACK).any(-1).sum())) > 0:
        said.append(f"boxes: {inside_out} with x1 < x0 or y1 < y0")
    if categories and (unknown := set(got.labels.tolist()) - set(categories)):
        said.append(f"labels: unknown {sorted(unknown)[:5]}")
    return tuple(said)


def match(got: Answer, want: Expected, limits: Limits, labelled: bool = True) -> NDArray[np.int64]:
    """One-to-one pairs (engine's, PyTorch's) of what says the same, the nearest taken first: [pairs, 2]."""
    box = np.abs(got.boxes[:, None] - want.boxes[None]).max(-1)  # [K, M]
    score = np.abs(got.scores[:, None] - want.scores[None])
    same = score <= limits.pair_score
    if labelled:
        same &= got.labels[:, None] == want.labels[None]
    rows, columns = np.nonzero(same)
    near = box[rows, columns] <= limits.pair_box
    if limits.pair_iou < 1:
        near |= iou(got.boxes[rows], want.boxes[columns]) >= limits.pair_iou
    rows, columns = rows[near], columns[near]
    apart = box[rows, columns] / limits.pair_box + score[rows, columns] / limits.pair_score
    pairs, used_rows, used_columns = [], set(), set()
    for index in np.argsort(apart, kind="stable").tolist():
        row, column = int(rows[index]), int(columns[index])
        if row not in used_rows and column not in used_columns:
            used_rows.add(row)
            used_columns.add(column)
            pairs.append((row, column))
    return np.array(pairs, np.int64).reshape(-1, 2)


def iou(a: Array, b: Array) -> Array:
    """Intersection over union of boxes pair by pair: [n, 4], [n, 4] -> [n]; 1 where both have no area."""
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    union = (a[:, 2:] - a[:, :2]).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1) - shared
    overlap: Array = np.where(union > 0, shared / np.where(union > 0, union, 1), 1)
    return overlap


def _mislabelled(got: Answer, want: Expected, limits: Limits, lonely: NDArray[np.bool_]) -> int:
    if not lonely.any():
        return 0
    alone = Answer(got.boxes[lonely], got.scores[lonely], got.labels[lonely])
    return len(match(alone, want, limits, labelled=False))


def _signature(got: Answer, want: Expected, pairs: NDArray[np.int64]) -> tuple[float, str]:
    """The known fault of which the box errors hold most, and how much, 0 to 1."""
    _, once = np.unique(want.boxes[pairs[:, 1]], axis=0, return_index=True)  # a box has several labels
    pairs = pairs[once]
    if len(pairs) < LEAST_BOXES:
        return 0.0, ""
    error = _bounded(got.boxes[pairs[:, 0]] - want.boxes[pairs[:, 1]])
    found = {fault: _share(error, _bounded(moved[pairs[:, 1]])) for fault, moved in want.signatures.items()}
    return max(((value, fault) for fault, value in found.items()), default=(0.0, ""))


def _bounded(moved: Array) -> Array:
    """Without the few large values, which come where one cell is mistaken for its neighbour."""
    bound = 4 * float(np.median(np.abs(moved)))
    bounded: Array = moved.clip(-bound, bound)
    return bounded


def _share(error: Array, fault: Array) -> float:
    """The correlation of the two, or how much of `fault` there is in `error`, whichever is less."""
    both, errors, faults = (float((a * b).sum()) for a, b in ((error, fault), (error, error), (fault, fault)))
    return min(both / (errors * faults) ** 0.5, both / faults) if errors > 0 and faults > 0 else 0.0
