"""Draws stained blood smears as a microscope's camera sees them, with the exact box of every cell.

Red cells absorb light, so where they overlap they darken; white cells and platelets are painted over them. Sizes,
counts, colours and overlaps follow the statistics of stained smears photographed at 640x480.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from samples.cells import (
    WHITE_KINDS,
    Canvas,
    draw_dust,
    draw_platelet,
    draw_red_cell,
    draw_refraction,
    draw_white_cell,
    random_outline,
)
from samples.outlines import FloatArray, Outline

CATEGORIES = {1: "RBC", 2: "WBC", 3: "Platelets"}
RED, WHITE, PLATELET = 1, 2, 3

_MIN_SIDE_PX = 32
_REFERENCE_AREA_PX = 480 * 640
_THROWS = 30
# A cell is labelled from this visible share on; below the second figure it is an unlabelled sliver at the border.
# Nothing is drawn between the two, so no label is a matter of taste.
_LABELLED_SHARE, _SLIVER_SHARE = 0.5, 0.25


@dataclass(frozen=True)
class Smear:
    """A picture and the visible part of every cell in it; category ids are CATEGORIES' keys."""

    image: NDArray[np.uint8]  # [H, W, 3] RGB
    boxes: NDArray[np.float32]  # [n, 4] x0, y0, x1, y1 in px, inside the image
    category_ids: NDArray[np.int64]  # [n]


@dataclass(frozen=True)
class _Cell:
    category_id: int
    outline: Outline
    kind: str = ""


def draw_smear(seed: int, height: int = 480, width: int = 640) -> Smear:
    """The smear of this seed: same seed and size, same picture. Cells scale with the picture's area.

    Raises ValueError for a negative seed or a side under 32 px.
    """
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if min(height, width) < _MIN_SIDE_PX:
        raise ValueError(f"a smear needs sides of at least {_MIN_SIDE_PX} px, got {height}x{width}")
    rng = np.random.default_rng(seed)
    scale = float(np.sqrt(height * width / _REFERENCE_AREA_PX))
    cells = _place_cells(rng, height, width, scale)

    canvas = Canvas.blank(rng, height, width, scale)
    for _ in range(int(rng.integers(0, 5))):
        draw_dust(canvas, rng)
    red_cells = [cell for cell in cells if cell.category_id == RED]
    for cell in red_cells:
        draw_red_cell(canvas, rng, cell.outline)
    canvas.develop()
    refracting_share = rng.choice([0.02, 0.1, 0.4])
    for cell in red_cells:
        if rng.random() < refracting_share:
            draw_refraction(canvas, rng, cell.outline)
    for cell in cells:
        if cell.category_id == WHITE:
            draw_white_cell(canvas, rng, cell.outline, cell.kind)
        elif cell.category_id == PLATELET:
            draw_platelet(canvas, rng, cell.outline)
    image = _photograph(canvas.image, rng)

    labelled = [cell for cell in cells if _visible_share(cell.outline, height, width) >= _LABELLED_SHARE]
    boxes = np.array([cell.outline.box() for cell in labelled], dtype=np.float32).reshape(-1, 4)
    boxes = np.clip(boxes, 0.0, np.array([width, height, width, height], dtype=np.float32))
    category_ids = np.array([cell.category_id for cell in labelled], dtype=np.int64)
    return Smear(image=image, boxes=boxes, category_ids=category_ids)


def _place_cells(rng: np.random.Generator, height: int, width: int, scale: float) -> list[_Cell]:
    """Throw cells at the picture, white ones first; a cell that lands too near another is thrown again."""
    cells: list[_Cell] = []

    def place(category_id: int, radius_px: float, gap: dict[int, float], clumping: float = 0.0, kind: str = "") -> None:
        for _ in range(_THROWS):
            radius = radius_px * scale * float(np.clip(rng.normal(1.0, 0.09), 0.75, 1.35))
            x, y = rng.uniform(-0.4 * radius, width + 0.4 * radius), rng.uniform(-0.4 * radius, height + 0.4 * radius)
            if cells and rng.random() < clumping:
                neighbour = cells[int(rng.integers(len(cells)))].outline
                angle = rng.uniform(0.0, 2.0 * np.pi)
                reach = (neighbour.radius + radius) * rng.uniform(gap[RED], 1.02)
                x, y = neighbour.x + reach * np.cos(angle), neighbour.y + reach * np.sin(angle)
            if any(_distance(x, y, radius, cell.outline) < gap[cell.category_id] for cell in cells):
                continue
            outline = random_outline(
                rng, x, y, radius, stretched=category_id != WHITE, raggedness=2.5 if category_id == PLATELET else 1.0
            )
            share = _visible_share(outline, height, width)
            if share >= _LABELLED_SHARE or (category_id == RED and 0.0 < share < _SLIVER_SHARE):
                cells.append(_Cell(category_id, outline, kind))
                return

    for _ in range(int(rng.choice(4, p=[0.06, 0.84, 0.07, 0.03]))):
        kind = str(rng.choice(list(WHITE_KINDS), p=list(WHITE_KINDS.values())))
        place(WHITE, rng.uniform(56.0, 88.0) if kind == "round" else rng.uniform(80.0, 124.0), {WHITE: 0.95}, kind=kind)
    red_radius, nearness, clumping = rng.normal(49.0, 3.0), rng.uniform(0.45, 1.0), rng.uniform(0.0, 0.8)
    for _ in range(int(rng.integers(8, 27))):
        place(RED, red_radius, {WHITE: 0.9, RED: nearness}, clumping)
    platelet_radius, on_cells = rng.uniform(15.0, 24.0), rng.random() < 0.2
    for _ in range(int(rng.choice(7, p=[0.3, 0.28, 0.2, 0.1, 0.06, 0.04, 0.02]))):
        place(PLATELET, platelet_radius, {WHITE: 1.02, RED: 0.3 if on_cells else 0.98, PLATELET: 1.0})
    return cells


def _distance(x: float, y: float, radius: float, other: Outline) -> float:
    """Distance of the centres in units of the sum of the radii: 1 where two discs touch."""
    return math.hypot(x - other.x, y - other.y) / (radius + other.radius)


def _visible_share(outline: Outline, height: int, width: int) -> float:
    x0, y0, x1, y1 = outline.box()
    visible = max(0.0, min(x1, width) - max(x0, 0.0)) * max(0.0, min(y1, height) - max(y0, 0.0))
    return visible / ((x1 - x0) * (y1 - y0))


def _photograph(linear: FloatArray, rng: np.random.Generator) -> NDArray[np.uint8]:
    """[H, W, 3] in 0..255: sensor noise, then the softness of a JPEG file."""
    height, width, _ = linear.shape
    noise = rng.standard_normal((height, width, 1), dtype=np.float32)
    linear += noise * np.float32(rng.uniform(0.2, 1.5))
    pixels = np.clip(linear, 0.0, 255.0).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=int(rng.integers(70, 96)))
    return np.array(Image.open(stream).convert("RGB"))
