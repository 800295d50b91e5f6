"""The report of `ddetr verify` as one HTML file, with pictures of where engine and PyTorch disagree."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from bundle import Bundle
from parity import GateReport, Proof, Row
from parity.compare import match
from parity.proof import Expected
from parity.report import MOST_FAILURES, summaries

if TYPE_CHECKING:
    from cli.verify import Verdict

MOST_PICTURES = 6  # of an engine
MOST_BOXES = 15  # of either side in a picture, the strongest
WIDEST_PX = 640
EXPECTED, GOT = (29, 122, 196), (233, 84, 40)  # blue and orange: apart for most colour-blind eyes

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1c2430; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #d8dee6; }
td { white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
h2 { margin: 2rem 0 .3rem; font-size: 1.15rem; }
.passed { color: #11734b; } .FAILED, .CANNOT { color: #b3261e; } .not-run { color: #6b7684; }
li { font-family: ui-monospace, monospace; font-size: 13px; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; vertical-align: top; }
figure img { max-width: 100%; display: block; } figcaption { font-size: 13px; max-width: 40rem; }
.expected { color: rgb(29 122 196); font-weight: 600; } .got { color: rgb(233 84 40); font-weight: 600; }
"""


def page(bundle: Bundle, proof: Proof, verdicts: Sequence[Verdict]) -> str:
    """The whole file; it needs nothing beside itself."""
    model = bundle.manifest.model
    title = escape(f"{model.name} {model.version}: engines against float32 PyTorch")
    parts = [_engine(bundle, proof, verdict) for verdict in verdicts]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n'
        f"<p>{escape(str(bundle.path))}, {len(proof.canvases)} canvases of "
        f"{len(proof.canvases[0].expected) if proof.canvases else 0} pictures, drawn from seeds.</p>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _engine(bundle: Bundle, proof: Proof, verdict: Verdict) -> str:
    said = f'<h2><span class="{verdict.word.replace(" ", "-")}">{verdict.word}</span> {escape(verdict.name)}</h2>\n'
    if verdict.report is None:
        return f"{said}<p>{escape(verdict.why)}</p>"
    said += f"<p>{escape(verdict.headline().removeprefix(verdict.word).strip())}</p>\n{_figures(verdict.report)}"
    failures = verdict.report.failures
    if not failures:
        return f"{said}<p>No disagreement.</p>"
    lines = "".join(f"<li>{escape(line)}</li>" for line in failures[:MOST_FAILURES])
    more = len(failures) - MOST_FAILURES
    said += f"<ul>{lines}</ul>" + (f"<p>and {more} more</p>" if more > 0 else "")
    return said + _disagreements(bundle, proof, verdict.report)


def _figures(report: GateReport) -> str:
    limits = report.limits
    heads = ("canvas", "batch", "answers", "median box error", "worst", "median score error", "worst", "sorted scores",
             "least IoU", "strays", "of a known fault")  # fmt: skip
    rows = [
        (f"limit ({report.precision})", "", "", f"{limits.box_median:.1e}", f"{limits.pair_box:.1e}",
         f"{limits.score_median:.1e}", f"{limits.pair_score:.1e}", f"{limits.curve:.1e}", "",
         f"{limits.strays:.0%}", "")
    ]  # fmt: skip
    for one in summaries(report):
        cells = one.cells()
        rows.append(
            (one.canvas, str(one.batch_size), str(one.answers), cells["box_median"], cells["box_max"],
             cells["score_median"], cells["score_max"], cells["curve"], cells["min_iou"], str(one.strays),
             f"{one.signature:.2f}")
        )  # fmt: skip
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>\n"


def _disagreements(bundle: Bundle, proof: Proof, report: GateReport) -> str:
    """A figure for each of the first pictures, of different slots, on which boxes differ."""
    by_canvas = {part.canvas: part for part in proof.canvases}
    figures: list[str] = []
    seen: set[tuple[str, int]] = set()
    for row in report.rows:
        kind = (str(row.canvas), row.picture)
        if row.got is None or row.figures.faults or kind in seen or len(figures) == MOST_PICTURES:
            continue
        seen.add(kind)
        part = by_canvas[row.canvas]
        pictures = part.pictures()
        height, width = pictures.sizes[row.picture].tolist()
        pixels = pictures.images[row.picture, :height, :width]
        figures.append(_figure(bundle, row, part.expected[row.picture], pixels, report))
    return "".join(figures)


def _figure(bundle: Bundle, row: Row, want: Expected, pixels: NDArray[np.uint8], report: GateReport) -> str:
    assert row.got is not None  # the caller has asked
    pairs = match(row.got, want, report.limits)
    missing = sorted(set(range(len(row.got.scores))) - set(pairs[:, 1].tolist()))[:MOST_BOXES]
    surplus = sorted(set(range(len(row.got.scores))) - set(pairs[:, 0].tolist()))[:MOST_BOXES]
    if not missing and not surplus:  # all have partners, a little aside: the farthest ones
        apart = np.abs(row.got.boxes[pairs[:, 0]] - want.boxes[pairs[:, 1]]).max(-1)
        worst = pairs[np.argsort(-apart)[:MOST_BOXES]]
        surplus, missing = worst[:, 0].tolist(), worst[:, 1].tolist()
    names = bundle.manifest.categories
    sides = [(want.boxes[missing], want.labels[missing], want.scores[missing], EXPECTED)]
    sides.append((row.got.boxes[surplus], row.got.labels[surplus], row.got.scores[surplus], GOT))
    image = Image.fromarray(pixels)
    scale = min(2.0, WIDEST_PX / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale))).convert("L").convert("RGB")
    image = Image.blend(image, Image.new("RGB", image.size, "white"), 0.5)  # so that the boxes stand out
    pen = ImageDraw.Draw(image)
    for side, (boxes, labels, scores, colour) in enumerate(sides):
        for box, label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True):
            x0, x1 = sorted((box[0] * image.width, box[2] * image.width))
            y0, y1 = sorted((box[1] * image.height, box[3] * image.height))
            pen.rectangle((x0, y0, x1, y1), outline=colour, width=2)
            place = (x0 + 3, y0 + 1) if side == 0 else (x0 + 3, y1 - 13)  # one above, the other below
            pen.text(place, f"{names.get(label, label)} {score:.2f}", fill=colour, stroke_width=2, stroke_fill="white")
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = (
        f'{escape(row.where)}: <span class="expected">{len(missing)} of PyTorch</span>, '
        f'<span class="got">{len(surplus)} of the engine</span>'
    )
    shown = f'<img alt="{escape(row.where)}" src="data:image/webp;base64,{data}">'
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>\n"
