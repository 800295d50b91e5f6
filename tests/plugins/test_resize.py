"""The native resize on every path of it: Pillow's bytes at any size, and nothing touched beyond the two pictures."""

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import plugins

Pixels = NDArray[np.uint8]

PATHS = ("vnni", "avx2", "portable")
ALL_PAIRS = np.stack(np.divmod(np.arange(256 * 256 + 2), 256), axis=0).astype(np.uint8)  # [2, 3 * 21846]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    path = plugins.resize_library()
    if path is None:
        pytest.skip("libresize.so is not built: no C++ compiler")
    loaded = ctypes.CDLL(str(path))
    loaded.resize_rgb.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64] * 2
    loaded.resize_cpu_path.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Iterator[str]:
    """A path of the kernel, chosen for the test."""
    best = library.resize_cpu_path()
    if library.resize_set_cpu_path(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    assert library.resize_cpu_path().decode() == request.param
    yield request.param
    library.resize_set_cpu_path(best)


def resize(library: ctypes.CDLL, pixels: Pixels, height: int, width: int) -> Pixels:
    target = np.empty((height, width, 3), np.uint8)
    assert library.resize_rgb(pixels.ctypes.data, *pixels.shape[:2], target.ctypes.data, height, width) == 0
    return target


def pillow(pixels: Pixels, height: int, width: int) -> Pixels:
    """Rows first: Pillow 13 begins with the columns where that saves work, and then differs from itself by a level."""
    across = Image.fromarray(pixels).resize((width, pixels.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(across.resize((width, height), Image.Resampling.BILINEAR))


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def extremes(pixels: Pixels) -> Pixels:
    """Sums at both ends of a byte."""
    return np.where(pixels > 127, 255, 0).astype(np.uint8)


SIDES = st.one_of(st.integers(1, 12), st.integers(1, 130), st.integers(1, 700))


@pytest.mark.usefixtures("path")
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 2**32 - 1))
def test_gives_the_bytes_that_pillow_gives_at_any_size(
    library: ctypes.CDLL, height: int, width: int, to_height: int, to_width: int, seed: int
) -> None:
    for pixels in (noise(height, width, seed), extremes(noise(height, width, seed))):
        assert np.array_equal(resize(library, pixels, to_height, to_width), pillow(pixels, to_height, to_width))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    ("size", "to"),
    [
        pytest.param((480, 640), (800, 1066), id="enlarged"),
        pytest.param((1200, 1600), (800, 1066), id="shrunk by less than two"),
        pytest.param((480, 640), (288, 384), id="shrunk, five taps"),
        pytest.param((1500, 2000), (400, 533), id="shrunk by four"),
        pytest.param((480, 640), (800, 640), id="higher only"),
        pytest.param((480, 640), (480, 1066), id="wider only"),
        pytest.param((480, 640), (300, 640), id="lower only"),
        pytest.param((480, 640), (480, 333), id="narrower only"),
        pytest.param((480, 640), (480, 640), id="left as it is"),
        pytest.param((700, 300), (350, 600), id="wider and lower"),
        pytest.param((300, 700), (600, 350), id="narrower and higher"),
        pytest.param((999, 1000), (998, 999), id="hardly smaller"),
        pytest.param((5, 5), (4, 4), id="smaller, but of two taps each"),
        pytest.param((1, 1), (70, 70), id="one pixel"),
        pytest.param((1, 20_000), (3, 1333), id="one row"),
        pytest.param((20_000, 1), (1333, 1), id="one column"),
        pytest.param((2, 65_535), (1, 1), id="longest to one"),
        pytest.param((2, 3), (1, 65_535), id="to the longest"),
    ],
)
def test_gives_the_bytes_that_pillow_gives_at_these_sizes(
    library: ctypes.CDLL, size: tuple[int, int], to: tuple[int, int]
) -> None:
    for pixels in (noise(*size), extremes(noise(*size))):
        assert np.array_equal(resize(library, pixels, *to), pillow(pixels, *to))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("width", range(1, 70))
def test_every_number_of_bytes_left_beside_whole_blocks(library: ctypes.CDLL, width: int) -> None:
    for size, to in (((9, 20), (15, width)), ((15, 200), (9, width)), ((9, width), (15, width))):
        assert np.array_equal(resize(library, noise(*size), *to), pillow(noise(*size), *to))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("to", [97, 256, 1000])
def test_every_pair_of_bytes_is_blended_exactly(library: ctypes.CDLL, to: int) -> None:
    """By every weight that there is on enlarging two pixels to `to`: down the columns, then along the rows."""
    across = ALL_PAIRS.reshape(2, -1, 3)  # two rows; a column for every three pairs
    assert np.array_equal(resize(library, across, to, across.shape[1]), pillow(across, to, across.shape[1]))
    down = np.ascontiguousarray(across.transpose(1, 0, 2))
    assert np.array_equal(resize(library, down, down.shape[0], to), pillow(down, down.shape[0], to))


@pytest.mark.usefixtures("path")
def test_all_white_and_all_black_stay_so(library: ctypes.CDLL) -> None:
    for level in (0, 255):
        for size, to in (((48, 64), (80, 106)), ((120, 160), (80, 107)), ((300, 400), (33, 44))):
            assert (resize(library, np.full((*size, 3), level, np.uint8), *to) == level).all()


# Pages that may not be touched lie against the ends of both pictures.
AT_THE_END_OF_MEMORY = """
import ctypes, mmap, random, sys

library, path = ctypes.CDLL(sys.argv[1]), sys.argv[2].encode()
library.resize_rgb.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64] * 2
libc = ctypes.CDLL(None)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
ROOM = 64 * mmap.PAGESIZE

def end_of_memory():
    memory = mmap.mmap(-1, ROOM + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + ROOM
    assert libc.mprotect(end, mmap.PAGESIZE, 0) == 0
    return memory, end

(source, source_end), (target, target_end) = end_of_memory(), end_of_memory()
assert library.resize_set_cpu_path(path) == 0
random.seed(0)
for case in range(2000):
    most = random.choice([2, 8, 40, 200])
    h, w, th, tw = (random.randint(1, most) for _ in range(4))
    before = target_end - th * tw * 3 - 1
    ctypes.memset(before, 77, 1)
    assert library.resize_rgb(source_end - h * w * 3, h, w, target_end - th * tw * 3, th, tw) == 0
    assert ctypes.c_uint8.from_address(before).value == 77
print("untouched")
"""


def test_touches_nothing_beyond_the_pictures(library: ctypes.CDLL, path: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END_OF_MEMORY, str(plugins.resize_library()), path],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parent,
    )
    assert (done.returncode, done.stdout) == (0, "untouched\n"), done.stderr


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (65_536, 5), (5, -1)])
def test_sizes_that_cannot_be_are_refused(library: ctypes.CDLL, size: tuple[int, int]) -> None:
    pixels, target = noise(6, 7), np.zeros((6, 7, 3), np.uint8)
    assert library.resize_rgb(pixels.ctypes.data, 6, 7, target.ctypes.data, *size) == 1
    assert library.resize_rgb(pixels.ctypes.data, *size, target.ctypes.data, 6, 7) == 1
    assert not target.any()


def test_a_path_that_is_not_there_cannot_be_chosen(library: ctypes.CDLL) -> None:
    before = library.resize_cpu_path()
    assert library.resize_set_cpu_path(b"abacus") == -1
    assert library.resize_cpu_path() == before
