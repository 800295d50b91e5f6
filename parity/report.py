"""What the gate found, as a table for people and as a document for programs."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from parity.gate import GateReport, Row, typical

MOST_FAILURES = 12


@dataclass(frozen=True)
class Summary:
    """The answers of one canvas and batch size: of box and score the worst pair, and the median picture's median."""

    canvas: str
    batch_size: int
    answers: int
    box_median: float
    box_max: float
    score_median: float
    score_max: float
    curve: float
    min_iou: float
    strays: int
    signature: float
    agreement: float
    paired: int
    failures: int

    def cells(self) -> dict[str, str]:
        """The errors of the pairs in words; dashes where there are no pairs."""
        errors = {name: getattr(self, name) for name in ("box_median", "box_max", "score_median", "score_max")}
        return {name: f"{value:.1e}" if self.paired else "-" for name, value in errors.items()} | {
            "curve": f"{self.curve:.1e}",
            "min_iou": f"{self.min_iou:.3f}" if self.paired else "-",
        }


def summaries(report: GateReport) -> list[Summary]:
    """One for each canvas and batch size, in the order they were run."""
    kinds: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in report.rows:
        kinds[str(row.canvas), row.batch_size].append(row)
    return [_summary(report, canvas, batch_size, rows) for (canvas, batch_size), rows in kinds.items()]


def _summary(report: GateReport, canvas: str, batch_size: int, rows: Sequence[Row]) -> Summary:
    figures = [row.figures for row in rows]
    place = f"canvas {canvas}, batch of {batch_size}"
    return Summary(
        canvas=canvas,
        batch_size=batch_size,
        answers=len(rows),
        box_median=typical(rows, "box_median"),
        box_max=max(one.box_max for one in figures),
        score_median=typical(rows, "score_median"),
        score_max=max(one.score_max for one in figures),
        curve=typical(rows, "curve"),
        min_iou=min(one.min_iou for one in figures),
        strays=max(one.strays for one in figures),
        signature=max(one.signature for one in figures),
        agreement=min(one.agreement for one in figures),
        paired=sum(one.paired for one in figures),
        failures=sum(line.startswith((f"{place},", f"{place}:")) for line in report.failures),
    )


def table(report: GateReport) -> str:
    """Some lines: the figures under their limits, then what failed."""
    limits = report.limits
    heads = ("canvas", "batch", "answers", "box median", "max", "score median", "max", "curve", "strays", "fault")
    widths = (10, 5, 7, 10, 8, 12, 8, 8, 6, 6)

    def line(cells: Sequence[str]) -> str:
        return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()

    lines = [line(heads)]
    lines.append(
        line(
            (
                f"{report.precision} limit",
                "",
                "",
                f"{limits.box_median:.1e}",
                f"{limits.pair_box:.1e}",
                f"{limits.score_median:.1e}",
                f"{limits.pair_score:.1e}",
                f"{limits.curve:.1e}",
                f"{limits.strays:.0%}",
                "",
            )
        )  # fmt: skip
    )
    for one in summaries(report):
        cells = one.cells()
        lines.append(
            line(
                (
                    one.canvas,
                    str(one.batch_size),
                    str(one.answers),
                    cells["box_median"],
                    cells["box_max"],
                    cells["score_median"],
                    cells["score_max"],
                    cells["curve"],
                    str(one.strays),
                    f"{one.signature:.2f}",
                )
            )  # fmt: skip
        )
    shown = report.failures[:MOST_FAILURES]
    lines += [f"  {failure}" for failure in shown]
    if len(report.failures) > len(shown):
        lines.append(f"  and {len(report.failures) - len(shown)} more")
    return "\n".join(lines)


def document(report: GateReport) -> dict[str, Any]:
    """The report as JSON can hold it."""
    return {
        "precision": report.precision,
        "passed": report.passed,
        "seconds": round(report.seconds, 3),
        "limits": asdict(report.limits),
        "figures": [asdict(one) for one in summaries(report)],
        "caught_by": report.caught_by,
        "failures": list(report.failures),
    }
