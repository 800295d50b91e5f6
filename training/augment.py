"""Augmentations: pure functions of a sample and a random generator, so that a run can be repeated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance

from bundle import ResizeRule, resized_size

MIN_VISIBLE = 0.3  # of a box's area, below which a cropped object is forgotten
UNLIMITED = 1 << 30  # px: a resize rule's longest side where there is none
PADDING = (124, 116, 104)  # ImageNet's mean: zero once normalised, as the padding of a batch


@dataclass(frozen=True)
class Sample:
    """A picture in training: pixels uint8 [H, W, 3]; boxes float32 [n, 4] x0, y0, x1, y1 px; classes int64 [n]."""

    pixels: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray


Draw = Callable[[np.random.Generator], Sample]


def view(
    sample: Sample,
    window: tuple[float, float, float, float],
    height: int,
    width: int,
    min_visible: float = MIN_VISIBLE,
) -> Sample:
    """The part of a picture inside `window` (x0, y0, x1, y1 px), resized to height x width px.

    The window may reach outside the picture: `PADDING` there. An object of which no more than `min_visible` (a share of
    its box's area) is inside is left out.
    """
    x0, y0, x1, y1 = window
    full_h, full_w = sample.pixels.shape[:2]
    inside = (max(x0, 0.0), max(y0, 0.0), min(x1, float(full_w)), min(y1, float(full_h)))
    sx, sy = width / (x1 - x0), height / (y1 - y0)
    left, top = round((inside[0] - x0) * sx), round((inside[1] - y0) * sy)
    right, bottom = round((inside[2] - x0) * sx), round((inside[3] - y0) * sy)
    resized = Image.fromarray(sample.pixels).resize(
        (max(right - left, 1), max(bottom - top, 1)), Image.Resampling.BILINEAR, box=inside
    )
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[:] = PADDING
    pixels[top : top + resized.height, left : left + resized.width] = np.asarray(resized)[
        : height - top, : width - left
    ]

    scale = np.array([sx, sy, sx, sy], dtype=np.float32)
    boxes = (sample.boxes - np.array([x0, y0, x0, y0], dtype=np.float32)) * scale
    clipped = boxes.clip(0, np.array([width, height, width, height], dtype=np.float32))
    kept = _areas(clipped) > min_visible * _areas(boxes)
    return Sample(pixels, clipped[kept].astype(np.float32), sample.classes[kept])


def _areas(boxes: np.ndarray) -> np.ndarray:
    areas: np.ndarray = (boxes[:, 2] - boxes[:, 0]).clip(0) * (boxes[:, 3] - boxes[:, 1]).clip(0)
    return areas


def flip(sample: Sample) -> Sample:
    """Left to right."""
    width = sample.pixels.shape[1]
    boxes = sample.boxes.copy()
    boxes[:, [0, 2]] = width - sample.boxes[:, [2, 0]]
    return replace(sample, pixels=np.ascontiguousarray(sample.pixels[:, ::-1]), boxes=boxes)


def transpose(sample: Sample) -> Sample:
    """Rows become columns: with flips on both sides, every turn by 90 degrees."""
    pixels = np.ascontiguousarray(sample.pixels.transpose(1, 0, 2))
    return replace(sample, pixels=pixels, boxes=sample.boxes[:, [1, 0, 3, 2]])


def resize(sample: Sample, rule: ResizeRule) -> Sample:
    """The paper's resize: shortest side to `rule.shortest`, the longest at most `rule.longest`."""
    full_h, full_w = sample.pixels.shape[:2]
    height, width = resized_size(full_h, full_w, rule)
    return view(sample, (0, 0, full_w, full_h), height, width)


def jitter(sample: Sample, rng: np.random.Generator, strength: float) -> Sample:
    """Brightness, contrast, saturation and colour balance, each by up to `strength` of itself (balance a quarter)."""
    image = Image.fromarray(sample.pixels)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(1 + strength * rng.uniform(-1, 1))
    gain = 1 + strength / 4 * rng.uniform(-1, 1, size=3)
    table = np.clip(np.arange(256)[None, :] * gain[:, None], 0, 255).round().astype(np.uint8)  # [3, 256]
    return replace(sample, pixels=np.asarray(image.point(table.flatten().tolist())))


@dataclass(frozen=True)
class PaperAugment:
    """The paper's: flip, then a random shortest side, half of the time after a random crop.

    The official code resizes, crops and resizes again; here the same window is taken from the picture and resized once.
    As there, a cropped object stays as long as a sliver of it is inside.
    """

    rule: ResizeRule
    sides: tuple[int, ...] = ()  # shortest sides to draw from; empty: 0.6 to 1.0 of the rule's in eleven steps

    def __call__(self, sample: Sample, rng: np.random.Generator, _another: Draw) -> Sample:
        if rng.random() < 0.5:
            sample = flip(sample)
        height, width = sample.pixels.shape[:2]
        window = (0.0, 0.0, float(width), float(height))
        if rng.random() < 0.5:
            window, height, width = self._crop(height, width, rng)
        sides = self.sides or tuple(round(self.rule.shortest * (0.6 + 0.04 * step)) for step in range(11))
        rule = ResizeRule(shortest=int(rng.choice(sides)), longest=self.rule.longest)
        return view(sample, window, *resized_size(height, width, rule), min_visible=0.0)

    def _crop(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[tuple[float, float, float, float], int, int]:
        """384 to 600 px of the picture resized to 400, 500 or 600: the window in px of the picture itself, h, w."""
        rule = ResizeRule(shortest=int(rng.choice((400, 500, 600))), longest=UNLIMITED)
        resized_h, resized_w = resized_size(height, width, rule)
        w, h = (int(rng.integers(384, min(side, 600) + 1)) for side in (resized_w, resized_h))
        x, y = rng.integers(resized_w - w + 1), rng.integers(resized_h - h + 1)
        sx, sy = width / resized_w, height / resized_h
        return (x * sx, y * sy, (x + w) * sx, (y + h) * sy), h, w


@dataclass(frozen=True)
class FixedAugment:
    """For small data of one aspect: turns, flips, crops or shrinks to height x width px, colour jitter, mosaics."""

    height: int
    width: int
    scales: tuple[float, float] = (0.6, 1.15)  # a window's side over the picture's
    colour: float = 0.25
    mosaic: float = 0.3
    turn: float = 0.3

    def __call__(self, sample: Sample, rng: np.random.Generator, another: Draw) -> Sample:
        if rng.random() < self.mosaic:
            sample = self._mosaic([sample, *(another(rng) for _ in range(3))], rng)
        else:
            sample = self._window(sample, rng, self.height, self.width)
        return jitter(sample, rng, self.colour)

    def _window(self, sample: Sample, rng: np.random.Generator, height: int, width: int) -> Sample:
        if rng.random() < self.turn:
            sample = transpose(sample)
        full_h, full_w = sample.pixels.shape[:2]
        largest = min(full_h / height, full_w / width)  # picture pixels per output pixel at scale 1
        scale = rng.uniform(*self.scales) * largest
        stretch = np.exp(rng.uniform(-0.1, 0.1))
        h, w = height * scale * stretch, width * scale / stretch
        x, y = (rng.uniform(min(0, full - side), max(0, full - side)) for full, side in ((full_w, w), (full_h, h)))
        sample = view(sample, (x, y, x + w, y + h), height, width)
        if rng.random() < 0.5:
            sample = flip(sample)
        if rng.random() < 0.5:
            sample = transpose(flip(transpose(sample)))  # upside down
        return sample

    def _mosaic(self, samples: Sequence[Sample], rng: np.random.Generator) -> Sample:
        """Four windows around a random point."""
        cx, cy = (int(side * rng.uniform(0.35, 0.65)) for side in (self.width, self.height))
        pixels = np.empty((self.height, self.width, 3), dtype=np.uint8)
        boxes, classes = [], []
        corners = ((0, 0, cx, cy), (cx, 0, self.width, cy), (0, cy, cx, self.height), (cx, cy, self.width, self.height))
        for sample, (x0, y0, x1, y1) in zip(samples, corners, strict=True):
            full_h, full_w = sample.pixels.shape[:2]
            per_pixel = rng.uniform(*self.scales) * min(full_h / self.height, full_w / self.width)
            w, h = (x1 - x0) * per_pixel, (y1 - y0) * per_pixel
            x, y = rng.uniform(0, max(full_w - w, 1e-6)), rng.uniform(0, max(full_h - h, 1e-6))
            tile = view(sample, (x, y, x + w, y + h), y1 - y0, x1 - x0)
            pixels[y0:y1, x0:x1] = tile.pixels
            boxes.append(tile.boxes + np.array([x0, y0, x0, y0], dtype=np.float32))
            classes.append(tile.classes)
        return Sample(pixels, np.concatenate(boxes), np.concatenate(classes))
