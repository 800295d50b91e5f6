import time

import numpy as np
import pytest

from samples import CATEGORIES, Smear, draw_smear

RED, WHITE, PLATELET = 1, 2, 3
SEEDS = range(12)


@pytest.fixture(scope="module")
def smears() -> list[Smear]:
    return [draw_smear(seed) for seed in SEEDS]


def test_types_and_shapes(smears: list[Smear]) -> None:
    for smear in smears:
        assert smear.image.dtype == np.uint8
        assert smear.image.shape == (480, 640, 3)
        assert smear.boxes.dtype == np.float32
        assert smear.boxes.shape == (len(smear.category_ids), 4)
        assert smear.category_ids.dtype == np.int64
        assert set(smear.category_ids.tolist()) <= set(CATEGORIES)
        assert smear.image.flags.writeable


def test_same_seed_same_smear() -> None:
    first, second, other = draw_smear(3), draw_smear(3), draw_smear(4)
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.boxes, second.boxes)
    np.testing.assert_array_equal(first.category_ids, second.category_ids)
    assert not np.array_equal(first.image, other.image)


def test_the_global_random_state_is_left_alone() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    draw_smear(0)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480), (240, 320), (97, 213), (32, 32), (64, 600)])
def test_boxes_lie_inside_the_image(height: int, width: int) -> None:
    for seed in range(5):
        smear = draw_smear(seed, height, width)
        assert smear.image.shape == (height, width, 3)
        x0, y0, x1, y1 = smear.boxes.T
        assert (x0 >= 0).all()
        assert (y0 >= 0).all()
        assert (x1 <= width).all()
        assert (y1 <= height).all()
        assert (x1 > x0).all()
        assert (y1 > y0).all()


def test_cells_differ_from_the_empty_field(smears: list[Smear]) -> None:
    for smear in smears:
        image = smear.image.astype(np.float32)
        empty = np.ones(image.shape[:2], dtype=bool)
        for x0, y0, x1, y1 in smear.boxes.astype(int):
            empty[max(0, y0 - 4) : y1 + 5, max(0, x0 - 4) : x1 + 5] = False
        field = np.median(image[empty], axis=0)
        for box in smear.boxes:
            x0, y0, x1, y1 = box.round().astype(int)
            # A disc fills pi/4 of its box; a pale centre and a cut corner take some of that.
            changed = np.abs(image[y0:y1, x0:x1] - field).max(axis=-1) > 8
            assert changed.mean() > 0.4, box


def test_boxes_are_tight_around_a_cell_that_stands_alone() -> None:
    """Each edge of the box of a lonely red cell is where the picture turns from cell to field, to within 3.5 px."""
    checked = 0
    for seed in range(40):
        smear = draw_smear(seed)
        green = smear.image[:, :, 1].astype(np.float32)
        for index in np.flatnonzero(smear.category_ids == RED):
            x0, y0, x1, y1 = smear.boxes[index].round().astype(int)
            margin = 14
            if min(x0, y0) < margin or x1 > 640 - margin or y1 > 480 - margin or not _is_alone(smear, index, margin):
                continue
            rows = _darkest(green[y0 - margin : y1 + margin, x0:x1], axis=1)
            columns = _darkest(green[y0:y1, x0 - margin : x1 + margin], axis=0)
            found = [_extent(columns), _extent(rows)]
            if None in found:  # a very pale cell, or dust beside it
                continue
            (left, right), (top, bottom) = found
            edges = np.array([left, top, right, bottom], dtype=np.float64) + [x0 - margin, y0 - margin] * 2
            np.testing.assert_allclose(edges, smear.boxes[index], atol=3.5)
            checked += 1
    assert checked >= 10


def _is_alone(smear: Smear, index: int, margin: int) -> bool:
    x0, y0, x1, y1 = smear.boxes[index] + [-margin, -margin, margin, margin]
    others = np.delete(smear.boxes, index, axis=0)
    touching = (others[:, 0] < x1) & (others[:, 2] > x0) & (others[:, 1] < y1) & (others[:, 3] > y0)
    return not touching.any()


def _darkest(patch: np.ndarray, axis: int) -> np.ndarray:
    return np.percentile(patch, 2, axis=axis)


def _extent(profile: np.ndarray) -> tuple[int, int] | None:
    """First and last place darker than half way between field and cell, ends excluded."""
    field, cell = np.median(np.r_[profile[:5], profile[-5:]]), np.percentile(profile, 10)
    if field - cell < 25 or np.ptp(np.r_[profile[:5], profile[-5:]]) > 10:
        return None
    dark = np.flatnonzero(profile < (field + cell) / 2)
    return int(dark[0]), int(dark[-1]) + 1


def test_counts_and_sizes_are_those_of_blood() -> None:
    smears = [draw_smear(seed) for seed in range(60)]
    category_ids = np.concatenate([smear.category_ids for smear in smears])
    boxes = np.concatenate([smear.boxes for smear in smears])
    counts = np.bincount(category_ids, minlength=4)[1:] / len(smears)
    assert 9 < counts[0] < 22
    assert 0.7 < counts[1] < 1.5
    assert 0.8 < counts[2] < 3
    sizes = [np.median((boxes[:, 2:] - boxes[:, :2])[category_ids == category_id]) for category_id in CATEGORIES]
    assert 85 < sizes[0] < 115
    assert 130 < sizes[1] < 220
    assert 30 < sizes[2] < 50


def test_drawing_is_fast_enough_for_a_data_loader() -> None:
    draw_smear(0)
    start = time.process_time()
    for seed in range(5):
        draw_smear(seed)
    # 30 to 40 ms each on one core of a server; the bound only catches a loop over pixels.
    assert (time.process_time() - start) / 5 < 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1,), "-1"), ((0, 31, 640), "31x640"), ((0, 480, 0), "480x0")],
)
def test_bad_arguments_are_named(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_smear(*arguments)
