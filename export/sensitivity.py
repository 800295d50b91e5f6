"""Which layers may compute in integers: all of them, less the groups that the answers suffer from."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from bundle import Agreement
from export.calibrate import Feed, Ranges, open_session
from export.quantisable import Layer, groups_of
from export.quantise import quantise
from export.trace import OUTPUTS
from parity.compare import Answer, iou

SAME_IOU = 0.9
THRESHOLD = 0.5  # of a score that a server shows when nobody asks for another
MOST_FLOAT = 0.5
"""Share of the groups that may stay float: a graph with more of them is not worth a second file."""

Say = Callable[[str], None]


class Refused(RuntimeError):
    """No choice of layers keeps the answers; the message of who asked says what was measured."""


@dataclass(frozen=True)
class Choice:
    """A graph that was accepted, and the groups that are float in it."""

    proto: onnx.ModelProto
    float_groups: tuple[str, ...]


def choose(
    proto: onnx.ModelProto,
    layers: Sequence[Layer],
    ranges: Ranges,
    probes: Sequence[Feed],
    accept: Callable[[onnx.ModelProto], bool],
    library: Path | None = None,
    threads: int = 1,
    say: Say = lambda _: None,
) -> Choice:
    """The graph with as many groups of `layers` in integers as `accept` lets be, the most harmful left out first.

    How harmful a group is, is asked only when the whole is not accepted: by the answers to `probes`, inputs of one
    picture each, of the graph in which it alone is integers. Raises Refused when MOST_FLOAT of them are out in vain.
    """
    floats: list[str] = []
    order: list[str] = []
    groups = groups_of(layers)
    while True:
        candidate = quantise(proto, [layer for layer in layers if layer.group not in floats], ranges)
        if accept(candidate):
            return Choice(candidate, tuple(group for group in groups if group in floats))
        if len(floats) + 1 > MOST_FLOAT * len(groups):
            raise Refused(f"nor with {', '.join(floats)} in float32" if floats else "there are no groups to leave out")
        order = order or _most_harmful_first(proto, layers, ranges, probes, library, threads, say)
        floats.append(order[len(floats)])
        say(f"without {', '.join(floats)}:")


def _most_harmful_first(
    proto: onnx.ModelProto,
    layers: Sequence[Layer],
    ranges: Ranges,
    probes: Sequence[Feed],
    library: Path | None,
    threads: int,
    say: Say,
) -> list[str]:
    want = answers(open_session(proto, library, threads), probes)
    harm: dict[str, float] = {}
    for group in groups_of(layers):
        alone = quantise(proto, _of(layers, {group}), ranges)
        found = agreement(want, answers(open_session(alone, library, threads), probes), threshold=0.0)
        harm[group] = 1 - found.matched + found.score_difference
        say(f"{group} alone: {found.matched:.1%} matched, scores differ by {found.score_difference:.4f}")
    return sorted(harm, key=lambda group: -harm[group])


def _of(layers: Sequence[Layer], groups: Collection[str]) -> list[Layer]:
    return [layer for layer in layers if layer.group in groups]


def answers(session: onnxruntime.InferenceSession, feeds: Iterable[Feed]) -> list[Answer]:
    """What the graph says to inputs of one picture each."""
    return [Answer(*(value[0] for value in session.run(list(OUTPUTS), dict(feed)))) for feed in feeds]


def agreement(want: Sequence[Answer], got: Sequence[Answer], threshold: float = THRESHOLD) -> Agreement:
    """How far `got` finds what `want` finds, picture by picture: one to one, the best scores first."""
    total, differences = 0, []
    for ours, theirs in zip(want, got, strict=True):
        free = np.ones(len(theirs.scores), bool)
        for box, score, label in zip(ours.boxes, ours.scores, ours.labels, strict=True):
            if score < threshold:
                continue
            total += 1
            overlap = iou(np.broadcast_to(box, theirs.boxes.shape), theirs.boxes)
            overlap = np.where(free & (theirs.labels == label), overlap, 0)
            best = int(overlap.argmax())
            if overlap[best] >= SAME_IOU:
                free[best] = False
                differences.append(abs(float(score) - float(theirs.scores[best])))
    return Agreement(
        detections=total,
        threshold=threshold,
        matched=len(differences) / total if total else 1.0,
        score_difference=float(np.mean(differences)) if differences else 0.0,
    )
