"""An engine against a bundle's proof: every slot of every batch size, in seconds."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bundle import Canvas
from parity.compare import Answer, Figures, compare
from parity.limits import ALONE, MEASURED, SIGNATURE, Limits, limits_for
from parity.pictures import Pictures
from parity.proof import CanvasProof, Proof, ProofInvalid

Infer = Callable[[NDArray[np.uint8], NDArray[np.int64]], Sequence[Any]]
"""images uint8 [n, H, W, 3] of one canvas, sizes int64 [n, 2] -> boxes [n, K, 4], scores [n, K], labels [n, K]."""

FIGURE_NAMES = {
    "box_median": "median box error",
    "score_median": "median score error",
    "curve": "difference of the sorted scores",
}


@dataclass(frozen=True, eq=False)
class Row:
    """One picture in one slot of one batch, and what came of it."""

    canvas: Canvas
    batch_size: int
    batch: int
    slot: int
    picture: int
    figures: Figures
    failures: tuple[str, ...]
    got: Answer | None

    @property
    def where(self) -> str:
        """The place, for messages."""
        return f"canvas {self.canvas}, batch of {self.batch_size}, slot {self.slot}, picture {self.picture}"


@dataclass(frozen=True, eq=False)
class GateReport:
    """What the gate found. failures: one line each, naming the place, the figure and its limit."""

    precision: str
    limits: Limits
    rows: tuple[Row, ...]
    failures: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether there was no failure, and something was compared."""
        return not self.failures

    @property
    def caught_by(self) -> dict[str, int]:
        """The figures that failed, and how often each, the most frequent first."""
        return dict(Counter(line.split(": ")[1] for line in self.failures).most_common())


def run_gate(
    infer: Infer,
    proof: Proof,
    precision: str,
    batch_sizes: Sequence[int],
    canvases: Sequence[Canvas] | None = None,
    progress: Callable[[str], None] | None = None,
    rounds: int | None = None,
) -> GateReport:
    """Hold `infer` against the proof on `canvases` (default: all of the proof's) in batches of these sizes.

    rounds: at most so many batches of each canvas and size; by default all of `batches_of`. A wrong answer, or an
    engine that raises, is a failure in the report, never an exception. `progress` gets a line for each canvas and batch
    size. Raises ValueError for a precision that has no limits.
    """
    limits = limits_for(precision, proof.integers if precision == "int8" else proof.half)
    started = time.perf_counter()
    rows: list[Row] = []
    failures: list[str] = []
    proven = {part.canvas: part for part in proof.canvases}
    for canvas in proven if canvases is None else canvases:
        if canvas not in proven:
            failures.append(
                f"canvas {canvas}: canvas: the proof has none of this size, only {', '.join(map(str, proven))}"
            )
            continue
        fewest = min((len(want.scores) for want in proven[canvas].expected), default=0)
        if fewest < proof.detections:
            failures.append(
                f"canvas {canvas}: proof: a picture has {fewest} expected detections, engines return "
                f"{proof.detections}: export the bundle again"
            )
            continue
        try:
            pictures = proven[canvas].pictures()
        except ProofInvalid as error:
            failures.append(f"canvas {canvas}: pictures: {error}")
            continue
        for batch_size in sorted(set(batch_sizes)):
            found = list(_run_batches(infer, proof, proven[canvas], pictures, batch_size, limits, rounds))
            answered = [row for row in found if isinstance(row, Row)]
            new = [line for row in found for line in (row.failures if isinstance(row, Row) else (row,))]
            new += _typical_failures(answered, limits)
            rows += answered
            failures += new
            if progress is not None:
                progress(f"{canvas} batch {batch_size}: {f'{len(new)} failures' if new else 'passed'}")
    if not rows and not failures:
        failures.append("all canvases: nothing compared: no canvas or no batch size was asked for")
    return GateReport(precision, limits, tuple(rows), tuple(failures), time.perf_counter() - started)


def batches_of(pictures: int, batch_size: int) -> list[list[int]]:
    """Indices of pictures, a slot each, so that every slot holds different pictures and each is in different slots."""
    rounds = pictures if batch_size < pictures else min(2, pictures)
    return [[(first + slot) % pictures for slot in range(batch_size)] for first in range(rounds)]


def _run_batches(
    infer: Infer,
    proof: Proof,
    part: CanvasProof,
    pictures: Pictures,
    batch_size: int,
    limits: Limits,
    rounds: int | None,
) -> Iterator[Row | str]:
    """A row for each slot, or the line that says why a batch has none."""
    for number, indices in enumerate(batches_of(len(part.expected), batch_size)[:rounds]):
        batch = pictures.take(indices)
        where = f"canvas {part.canvas}, batch of {batch_size}"
        try:
            boxes, scores, labels = (np.asarray(output) for output in infer(batch.images, batch.sizes))
        except Exception as error:
            yield f"{where}: raised: {type(error).__name__}: {' '.join(str(error).split()):.300}"
            continue
        lengths = [output.shape[0] if output.ndim else 0 for output in (boxes, scores, labels)]
        if lengths != [batch_size] * 3:
            yield f"{where}: batch: boxes, scores, labels of {lengths} images, expected {batch_size}"
            continue
        for slot, index in enumerate(indices):
            got = Answer(boxes[slot], scores[slot], labels[slot])
            figures = compare(got, part.expected[index], limits, proof.detections, proof.categories)
            row = Row(part.canvas, batch_size, number, slot, index, figures, (), got)
            failed = tuple(f"{row.where}: {line}" for line in failures_of(figures, limits))
            # Only what is to be looked at is kept.
            yield Row(part.canvas, batch_size, number, slot, index, figures, failed, got if failed else None)


def failures_of(figures: Figures, limits: Limits) -> list[str]:
    """A line for each figure beyond its limit; a fault is one by itself."""
    if figures.faults:
        return list(figures.faults)
    said = []
    allowed = max(math.floor(limits.strays * figures.counted), limits.least_strays)
    if figures.strays > allowed:
        line = f"strays: {figures.strays} of {figures.counted} detections without a partner, limit {allowed}"
        if figures.mislabelled:
            line += f"; {figures.mislabelled} of them have one of another label"
        said.append(line)
    for name, words in FIGURE_NAMES.items():
        found, limit = getattr(figures, name), ALONE * getattr(limits, name)
        if not found <= limit:
            said.append(f"{words}: {found:.2g}, limit of one picture {limit:.2g}")
    if not figures.signature <= SIGNATURE:
        said.append(f"signature: {figures.signature:.2f} of {figures.fault}, limit {SIGNATURE:g}")
    return said


def typical(rows: Sequence[Row], figure: str) -> float:
    """The median picture's figure, of those that have an answer."""
    values = [getattr(row.figures, figure) for row in rows if not row.figures.faults]
    return float(np.median(values)) if values else 0.0


def noise_of(report: GateReport) -> dict[str, float]:
    """The figures that limits follow, each of the canvas where it is worst; 0 where there is no answer."""
    rows: dict[Canvas, list[Row]] = {}
    for row in report.rows:
        rows.setdefault(row.canvas, []).append(row)
    return {name: max((typical(of_one, name) for of_one in rows.values()), default=0.0) for name in MEASURED}


def _typical_failures(rows: Sequence[Row], limits: Limits) -> list[str]:
    """A line for each figure whose median picture, of three or more of a canvas and batch size, is beyond its limit.

    One, too, where most detections are not found at all.
    """
    said: list[str] = []
    compared, paired = (sum(getattr(row.figures, name) for row in rows) for name in ("compared", "paired"))
    if paired < compared / 2:  # each picture may lack some, of few even all
        said.append(
            f"canvas {rows[0].canvas}, batch of {rows[0].batch_size}, all slots: found: {paired} of {compared} "
            "detections, limit half of them"
        )
    if len({row.picture for row in rows}) < 3:
        return said
    for name, words in FIGURE_NAMES.items():
        found, limit = typical(rows, name), getattr(limits, name)
        if not found <= limit:
            said.append(
                f"canvas {rows[0].canvas}, batch of {rows[0].batch_size}, all slots: {words}: {found:.2g}, "
                f"limit {limit:.2g}"
            )
    return said
