import numpy as np

from bundle import Canvas
from server.preprocess import lay_on_canvas, preprocess
from tests.server.fake_engine import MANIFEST


def test_resizes_by_the_rule_and_picks_the_canvas() -> None:
    pixels, canvas = preprocess(np.zeros((240, 320, 3), np.uint8), MANIFEST)
    assert pixels.shape == (64, 85, 3)
    assert pixels.dtype == np.uint8
    assert canvas == Canvas(height=64, width=96)


def test_a_picture_of_the_right_size_is_left_as_it_is() -> None:
    values = np.random.default_rng(0).integers(0, 255, (96, 64, 3), np.uint8)
    pixels, canvas = preprocess(values, MANIFEST)
    assert np.array_equal(pixels, values)
    assert canvas == Canvas(height=96, width=64)


def test_resize_is_bilinear_and_antialiased() -> None:
    stripes = np.zeros((128, 192, 3), np.uint8)
    stripes[:, ::2] = 200
    pixels, _ = preprocess(stripes, MANIFEST)
    # Without antialiasing every second column would be taken: all 0 or all 200.
    assert np.abs(pixels[:, 2:-2].astype(int) - 100).max() <= 1


def test_canvas_is_zero_around_each_image() -> None:
    canvas = Canvas(height=6, width=8)
    images = [np.full((6, 4, 3), 9, np.uint8), np.full((3, 8, 3), 7, np.uint8)]
    batch, sizes = lay_on_canvas(images, canvas)
    assert batch.shape == (2, 6, 8, 3)
    assert sizes.tolist() == [[6, 4], [3, 8]]
    assert sizes.dtype == np.int64
    assert (batch[0, :6, :4] == 9).all()
    assert not batch[0, :, 4:].any()
    assert (batch[1, :3] == 7).all()
    assert not batch[1, 3:].any()


def test_preprocess_takes_no_part_of_its_answer_from_elsewhere() -> None:
    pixels, _ = preprocess(np.full((70, 50, 3), (1, 2, 3), np.uint8), MANIFEST)
    assert (pixels == (1, 2, 3)).all()
