"""Augmentations: a box still bounds what it bounded, a generator's seed says all, and the recipe is the paper's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle import ResizeRule
from training.augment import (
    MIN_VISIBLE,
    PADDING,
    Draw,
    FixedAugment,
    PaperAugment,
    Sample,
    flip,
    jitter,
    resize,
    transpose,
    view,
)

BACKGROUND = (0, 0, 90)
COLOURS = np.array([(255, 60, 0), (60, 255, 0)], dtype=np.uint8)  # of class 0 and class 1
EDGE_PX = 1.6  # antialiasing smears an edge over its neighbours, and a window's border is rounded to a pixel

Augment = Callable[[Sample, np.random.Generator, Draw], Sample]


def painted(height: int, width: int, boxes: list[tuple[int, int, int, int]]) -> Sample:
    """Rectangles, the first of class 0, the next of class 1, each in its class' colour."""
    pixels = np.full((height, width, 3), BACKGROUND, dtype=np.uint8)
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        pixels[y0:y1, x0:x1] = COLOURS[index % 2]
    classes = np.arange(len(boxes)) % 2
    return Sample(pixels, np.array(boxes, dtype=np.float32).reshape(-1, 4), classes.astype(np.int64))


SCENE = painted(90, 120, [(10, 15, 50, 40), (70, 30, 100, 80)])


def bounds(pixels: np.ndarray, index: int) -> np.ndarray | None:
    """Where the colour of a class is: x0, y0, x1, y1."""
    main, other = (0, 1) if index == 0 else (1, 0)
    rows, columns = np.nonzero((pixels[..., main].astype(int) - pixels[..., other]) > 60)
    if not len(rows):
        return None
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def assert_bounded(sample: Sample, tolerance: float = EDGE_PX) -> None:
    """Each box bounds its colour (no two of one class may be left in the sample)."""
    assert len(set(sample.classes.tolist())) == len(sample.classes)
    height, width = sample.pixels.shape[:2]
    assert sample.pixels.dtype == np.uint8
    assert [str(sample.boxes.dtype), str(sample.classes.dtype)] == ["float32", "int64"]
    for box, index in zip(sample.boxes, sample.classes.tolist(), strict=True):
        assert box[0] < box[2] <= width
        assert box[1] < box[3] <= height
        assert box.min() >= 0
        seen = bounds(sample.pixels, index)
        if seen is None:  # a sliver
            assert min(box[2] - box[0], box[3] - box[1]) < 2 * EDGE_PX
        else:
            np.testing.assert_allclose(box, seen, atol=tolerance)


def same(a: Sample, b: Sample) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("pixels", "boxes", "classes"))


def no_other(_rng: np.random.Generator) -> Sample:
    raise AssertionError("the paper's augmentation takes one picture")


def test_flip_and_transpose_move_boxes_with_their_pixels() -> None:
    assert_bounded(SCENE, 0)
    for turned in (flip(SCENE), transpose(SCENE), transpose(flip(transpose(SCENE))), flip(transpose(SCENE))):
        assert_bounded(turned, 0)
        assert turned.classes.tolist() == [0, 1]
    assert flip(SCENE).boxes[0].tolist() == [70, 15, 110, 40]
    assert transpose(SCENE).pixels.shape == (120, 90, 3)
    assert same(flip(flip(SCENE)), SCENE)
    assert same(transpose(transpose(SCENE)), SCENE)


@pytest.mark.parametrize("shortest", [30, 45, 90, 133, 200])
def test_resize_is_the_papers_and_boxes_follow(shortest: int) -> None:
    resized = resize(SCENE, ResizeRule(shortest=shortest, longest=240))
    height, width = resized.pixels.shape[:2]
    assert (height, width) == ((shortest, int(shortest * 120 / 90)) if shortest < 181 else (180, 240))
    assert_bounded(resized)


@pytest.mark.parametrize(
    "window",
    [(0, 0, 120, 90), (5, 5, 105, 85), (-20, -30, 120, 90), (20.5, 10.25, 130, 120), (-50, -50, 200, 150)],
)
def test_a_view_moves_boxes_with_their_pixels(window: tuple[float, float, float, float]) -> None:
    assert_bounded(view(SCENE, window, 80, 110))


def test_a_view_pads_with_the_mean_colour_and_cuts_boxes_off() -> None:
    seen = view(SCENE, (-30, 0, 90, 90), 90, 120)
    assert (seen.pixels[:, :30] == PADDING).all()
    np.testing.assert_allclose(seen.boxes, [[40, 15, 80, 40], [100, 30, 120, 80]])
    assert view(SCENE, (60, 0, 120, 90), 90, 60).classes.tolist() == [1]  # the first is outside


def test_a_view_forgets_what_is_hardly_visible() -> None:
    just_under, just_over = 40 * (1 - MIN_VISIBLE) + 10.5, 40 * (1 - MIN_VISIBLE) + 9.5
    assert view(SCENE, (just_under, 0, 120, 90), 90, 60).classes.tolist() == [1]
    assert view(SCENE, (just_over, 0, 120, 90), 90, 60).classes.tolist() == [0, 1]
    assert view(SCENE, (49.5, 0, 120, 90), 90, 60, min_visible=0.0).classes.tolist() == [0, 1]
    assert view(SCENE, (50, 0, 120, 90), 90, 60, min_visible=0.0).classes.tolist() == [1]


def test_jitter_changes_colours_and_nothing_else() -> None:
    changed = jitter(SCENE, np.random.default_rng(1), 0.4)
    assert not np.array_equal(changed.pixels, SCENE.pixels)
    assert changed.pixels.shape == SCENE.pixels.shape
    assert np.array_equal(changed.boxes, SCENE.boxes)
    assert np.array_equal(jitter(SCENE, np.random.default_rng(1), 0.0).pixels, SCENE.pixels)


PAPER = PaperAugment(ResizeRule(shortest=100, longest=166))
FIXED = FixedAugment(height=72, width=96)
TURNS = FixedAugment(height=72, width=96, mosaic=0.0, colour=0.0)
MOSAICS = FixedAugment(height=72, width=96, mosaic=1.0, colour=0.0)


@pytest.mark.parametrize("augment", [PAPER, TURNS, FixedAugment(72, 96, mosaic=0.0)], ids=["paper", "fixed", "colour"])
def test_boxes_follow_their_pixels(augment: Augment) -> None:
    kept = 0
    for seed in range(60):
        sample = augment(SCENE, np.random.default_rng(seed), no_other)
        assert_bounded(sample, 2 * EDGE_PX)
        kept += len(sample.classes)
    assert kept > 60  # most objects survive


def test_boxes_of_a_mosaic_follow_their_pixels() -> None:
    one, empty = painted(90, 120, [(30, 20, 90, 70)]), painted(90, 120, [])
    kept = 0
    for seed in range(60):
        sample = MOSAICS(one, np.random.default_rng(seed), lambda _: empty)
        assert sample.pixels.shape == (72, 96, 3)
        if len(sample.classes):
            assert_bounded(sample, 2 * EDGE_PX)
            kept += 1
    assert kept > 30


def test_a_mosaic_takes_three_others() -> None:
    drawn = []

    def another(rng: np.random.Generator) -> Sample:
        drawn.append(rng.random())
        return SCENE

    sample = MOSAICS(SCENE, np.random.default_rng(0), another)
    assert len(drawn) == 3
    assert len(sample.classes) > 2


@pytest.mark.parametrize("augment", [PAPER, FIXED, MOSAICS], ids=["paper", "fixed", "mosaic"])
def test_the_generator_says_all(augment: Augment) -> None:
    def draw(seed: int) -> Sample:
        return augment(SCENE, np.random.default_rng(seed), lambda _: SCENE)

    assert same(draw(3), draw(3))
    assert len({draw(seed).pixels.tobytes() for seed in range(12)}) > 8


class Recorded(np.random.Generator):
    """A generator that remembers what was asked of it."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.random.PCG64(seed))
        self.choices: list[tuple[int, ...]] = []

    def choice(self, a, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.choices.append(tuple(int(value) for value in a))
        return super().choice(a, *args, **kwargs)


SCALES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
FIRST = (400, 500, 600)


def official_size(height: int, width: int, size: int, longest: int | None) -> tuple[int, int]:
    """The resize of the recipe, restated: shortest side to `size` unless the longest would exceed `longest`."""
    short, long = min(height, width), max(height, width)
    if longest is not None and long / short * size > longest:
        size = round(longest * short / long)
    return (size, int(size * width / height)) if height <= width else (int(size * height / width), size)


def test_the_recipe_is_the_papers() -> None:
    """Scales 480 to 800 in steps of 32, at most 1333; in half of all cases after a crop of 384 to 600 px."""
    augment = PaperAugment(ResizeRule(shortest=800, longest=1333))
    scene = painted(48, 64, [(10, 10, 40, 40)])
    cropped = flipped = 0
    plain_sizes = {official_size(48, 64, scale, 1333) for scale in SCALES}
    for seed in range(50):
        rng = Recorded(seed)
        sample = augment(scene, rng, no_other)
        height, width = sample.pixels.shape[:2]
        assert rng.choices in ([SCALES], [FIRST, SCALES])
        assert min(height, width) in SCALES or max(height, width) in range(1330, 1334)
        assert max(height, width) <= 1333
        if rng.choices == [SCALES]:
            assert (height, width) in plain_sizes
            left = sample.boxes[0, 0] / width
            assert left == pytest.approx(10 / 64, abs=1e-3) or left == pytest.approx(24 / 64, abs=1e-3)
            flipped += left > 0.2
        else:
            cropped += 1
            assert 384 / 600 - 0.01 <= height / width <= 600 / 384 + 0.01
    assert 15 < cropped < 35
    assert 0.25 < flipped / (50 - cropped) < 0.75


def test_a_crop_is_a_window_of_the_resized_picture() -> None:
    for height, width in ((48, 64), (64, 48), (50, 50), (30, 200)):
        for seed in range(40):
            rng = Recorded(seed)
            (x0, y0, x1, y1), h, w = PaperAugment(ResizeRule(shortest=800, longest=1333))._crop(height, width, rng)
            assert rng.choices == [FIRST]
            assert 384 <= min(h, w) <= max(h, w) <= 600
            assert -1e-9 <= x0 < x1 <= width + 1e-9
            assert -1e-9 <= y0 < y1 <= height + 1e-9
            sizes = [official_size(height, width, first, None) for first in FIRST]
            whole_h, whole_w = h * height / (y1 - y0), w * width / (x1 - x0)
            assert any(whole_h == pytest.approx(a) and whole_w == pytest.approx(b) for a, b in sizes)


def test_a_cropped_object_stays_while_a_sliver_is_inside() -> None:
    scene = painted(60, 80, [(0, 0, 80, 60)])
    sizes = []
    for seed in range(40):
        sample = PAPER(scene, np.random.default_rng(seed), no_other)
        assert sample.classes.tolist() == [0]  # however small the window
        height, width = sample.pixels.shape[:2]
        np.testing.assert_allclose(sample.boxes[0], [0, 0, width, height], atol=1e-3)
        sizes.append((height, width))
    assert len(set(sizes)) > 10

    corner = painted(100, 100, [(0, 0, 40, 40)])
    shares = []
    for seed in range(150):
        window, h, w = PAPER._crop(100, 100, np.random.default_rng(seed))
        seen = view(corner, window, h, w, min_visible=0.0)
        inside = window[0] < 40 and window[1] < 40
        assert len(seen.classes) == inside
        if inside:
            shares.append((40 - window[0]) * (40 - window[1]) / 1600)
    assert min(shares) < MIN_VISIBLE


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 120),
    width=st.integers(1, 120),
    shortest=st.integers(2, 80),
    seed=st.integers(0, 2**31),
    longest=st.integers(80, 130),
)
def test_pictures_of_any_size_can_be_augmented(height: int, width: int, shortest: int, seed: int, longest: int) -> None:
    scene = painted(height, width, [(0, 0, width, height), (width // 2, 0, width, max(height // 3, 1))])
    for augment in (PaperAugment(ResizeRule(shortest=shortest, longest=longest)), FixedAugment(24, 40)):
        sample = augment(scene, np.random.default_rng(seed), lambda _: scene)
        h, w = sample.pixels.shape[:2]
        assert min(h, w) >= 1
        assert len(sample.boxes) == len(sample.classes)
        assert (sample.boxes >= 0).all()
        assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()
        assert (sample.boxes <= np.array([w, h, w, h]) + 1e-3).all()
