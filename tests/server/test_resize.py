import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import plugins
from server import resize as module
from server.resize import resize

BUILT = pytest.mark.skipif(plugins.resize_library() is None, reason="libresize.so is not built: no C++ compiler")
SIDES = st.integers(1, 130)


def pillow(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


@BUILT
@settings(deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 2**32 - 1))
def test_is_within_a_level_of_pillow_at_any_size(
    height: int, width: int, to_height: int, to_width: int, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    difference = resize(pixels, to_height, to_width).astype(int) - pillow(pixels, to_height, to_width)
    assert np.abs(difference).max() <= 1, "Pillow 13 takes the columns first where it saves work"


@BUILT
@pytest.mark.parametrize(
    ("size", "to"),
    [
        ((480, 640), (800, 1066)),
        ((480, 640), (288, 384)),
        ((1500, 2000), (800, 1066)),
        ((1, 20_000), (3, 1333)),
        ((20_000, 1), (1333, 1)),
    ],
)
def test_gives_the_bytes_that_pillow_gives_at_real_sizes(size: tuple[int, int], to: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    assert np.array_equal(resize(noise, *to), pillow(noise, *to))
    extremes = np.where(noise > 127, 255, 0).astype(np.uint8)  # sums at both ends of a byte
    assert np.array_equal(resize(extremes, *to), pillow(extremes, *to))


@BUILT
def test_takes_views_that_are_not_in_one_piece() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    assert np.array_equal(resize(noise[::-2, 5:61], 33, 44), pillow(np.ascontiguousarray(noise[::-2, 5:61]), 33, 44))


def test_a_picture_of_that_size_is_left_as_it_is() -> None:
    pixels = np.zeros((4, 5, 3), np.uint8)
    assert resize(pixels, 4, 5) is pixels


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (65_536, 5), (5, -1)])
def test_sizes_that_cannot_be_are_refused_by_their_value(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"cannot resize 7x6 to {size[1]}x{size[0]} pixels"):
        resize(np.zeros((6, 7, 3), np.uint8), *size)


def test_without_the_library_pillow_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_native", lambda: None)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    assert np.array_equal(resize(noise, 80, 107), pillow(noise, 80, 107))
