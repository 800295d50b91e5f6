"""Draws stained blood smears as a microscope's camera sees them, with the exact box of every cell.

Red cells absorb light, so where they overlap they darken; white cells and platelets are painted over them. Sizes,
counts, colours and overlaps follow the statistics of stained smears photographed at 640x480.
"""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from samples.cells import Canvas, draw_dust, draw_platelet, draw_red_cell, draw_white_cell, random_outline
from samples.outlines import FloatArray, Outline

CATEGORIES = {1: "RBC", 2: "WBC", 3: "Platelets"}
RED, WHITE, PLATELET = 1, 2, 3

_MIN_SIDE_PX = 32
_REFERENCE_AREA_PX = 480 * 640
# A cell is labelled from this visible share on; below the second figure it is an unlabelled sliver at the border.
# Nothing is drawn between the two, so no label is a matter of taste.
_LABELLED_SHARE, _SLIVER_SHARE = 0.5, 0.25


@dataclass(frozen=True)
class Smear:
    """image uint8 [H, W, 3] RGB; boxes float32 [n, 4] x0, y0, x1, y1 in px, inside the image; category_ids int64 [n]."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    category_ids: NDArray[np.int64]


@dataclass(frozen=True)
class _Cell:
    category_id: int
    outline: Outline


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
    for cell in cells:
        if cell.category_id == RED:
            draw_red_cell(canvas, rng, cell.outline)
    canvas.develop()
    for cell in cells:
        if cell.category_id == WHITE:
            draw_white_cell(canvas, rng, cell.outline)
        elif cell.category_id == PLATELET:
            draw_platelet(canvas, rng, cell.outline)
    image = _photograph(canvas.image, rng)

    labelled = [cell for cell in cells if _visible_share(cell.outline, height, width) >= _LABELLED_SHARE]
    boxes = np.array([cell.outline.box() for cell in labelled], dtype=np.float32).reshape(-1, 4)
    boxes = np.clip(boxes, 0.0, np.array([width, height, width, height], dtype=np.float32))
    category_ids = np.array([cell.category_id for cell in labelled], dtype=np.int64)
    return Smear(image=image, boxes=boxes, category_ids=category_ids)


def _place_cells(rng: np.random.Generator, height: int, width: int, scale: float) -> list[_Cell]:
    cells: list[_Cell] = []

    def place(category_id: int, count: int, radius_px: float, spread: float, gap: dict[int, float]) -> None:
        for _ in range(count):
            for _ in range(30):
                radius = radius_px * scale * float(np.clip(rng.normal(1.0, spread), 0.7, 1.4))
                outline = random_outline(
                    rng, rng.uniform(-0.4 * radius, width + 0.4 * radius),
                    rng.uniform(-0.4 * radius, height + 0.4 * radius), radius, category_id == RED,
                )
                share = _visible_share(outline, height, width)
                if _SLIVER_SHARE <= share < _LABELLED_SHARE or (share < _LABELLED_SHARE and category_id != RED):
                    continue
                if all(_distance(outline, other.outline) >= gap[other.category_id] for other in cells):
                    cells.append(_Cell(category_id, outline))
                    break

    white_count = int(rng.choice(4, p=[0.06, 0.84, 0.07, 0.03]))
    place(WHITE, white_count, rng.uniform(62.0, 110.0), 0.1, {WHITE: 0.95})
    crowding = rng.uniform(0.58, 1.0)
    place(RED, int(rng.integers(8, 26)), rng.normal(49.0, 3.0), 0.09, {WHITE: 0.9, RED: crowding})
    platelets_on_cells = rng.random() < 0.2
    place(
        PLATELET, int(rng.choice(7, p=[0.3, 0.28, 0.2, 0.1, 0.06, 0.04, 0.02])), rng.uniform(15.0, 24.0), 0.12,
        {WHITE: 1.02, RED: 0.3 if platelets_on_cells else 0.98, PLATELET: 1.0},
    )
    return cells


def _distance(a: Outline, b: Outline) -> float:
    """Distance of the centres in units of the sum of the radii: 1 where two discs touch."""
    return float(np.hypot(a.x - b.x, a.y - b.y) / (a.radius + b.radius))


def _visible_share(outline: Outline, height: int, width: int) -> float:
    x0, y0, x1, y1 = outline.box()
    visible = max(0.0, min(x1, width) - max(x0, 0.0)) * max(0.0, min(y1, height) - max(y0, 0.0))
    return visible / ((x1 - x0) * (y1 - y0))


def _photograph(linear: FloatArray, rng: np.random.Generator) -> NDArray[np.uint8]:
    """[H, W, 3] in 0..255: sensor noise, then the softness of a JPEG file."""
    height, width, _ = linear.shape
    noise = rng.standard_normal((height, width, 1), dtype=np.float32)
    linear += noise * np.float32(rng.uniform(0.3, 2.0))
    pixels = np.clip(linear, 0.0, 255.0).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=int(rng.integers(70, 96)))
    return np.array(Image.open(stream).convert("RGB"))
