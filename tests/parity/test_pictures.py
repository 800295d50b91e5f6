"""The pictures of a proof are the same bytes everywhere, and fill their canvas as they say."""

import hashlib

import numpy as np
import pytest

from bundle import Canvas
from parity.pictures import FILLS, draw_pictures, proof_pictures, random_integers
from parity.proof import pictures_hash

CANVAS = Canvas(height=96, width=128)


def test_the_generator_is_splitmix64() -> None:
    # The reference values of the generator started at 0.
    assert [hex(int(n)) for n in random_integers(0, 0, 3)] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_a_seed_draws_the_same_bytes_on_every_machine() -> None:
    assert pictures_hash(proof_pictures(CANVAS, 7, 5)) == PINNED
    assert pictures_hash(proof_pictures(CANVAS, 8, 5)) != PINNED


def test_a_picture_depends_on_its_own_seed_and_place_only() -> None:
    together = proof_pictures(CANVAS, 3, 3)
    other = draw_pictures(CANVAS, (9, 4, 9))
    assert np.array_equal(together.images[1], other.images[1])
    assert not np.array_equal(other.images[0], other.images[2])


@pytest.mark.parametrize("index", range(len(FILLS)))
def test_a_picture_fills_what_its_size_says(index: int) -> None:
    pictures = proof_pictures(CANVAS, 1, len(FILLS))
    image, (height, width) = pictures.images[index], pictures.sizes[index]
    assert height <= CANVAS.height
    assert width <= CANVAS.width
    assert not image[height:].any()
    assert not image[:, width:].any()
    assert image[:height, :width].std() > 20, "areas, edges and detail"
    assert len({tuple(size) for size in pictures.sizes.tolist()}) == len(FILLS)


def test_a_canvas_of_a_pixel_can_be_drawn() -> None:
    pictures = proof_pictures(Canvas(height=1, width=1), 1, 3)
    assert pictures.images.shape == (3, 1, 1, 3)
    assert pictures.sizes.tolist() == [[1, 1]] * 3


def test_the_hash_is_over_sizes_and_pixels() -> None:
    pictures = proof_pictures(CANVAS, 1, 2)
    content = pictures.sizes.astype("<i8").tobytes() + pictures.images.tobytes()
    assert pictures_hash(pictures) == hashlib.sha256(content).hexdigest()


PINNED = "c8dace7e760651924a5168b7672abee418ab2965e7e78c560eb40b7029a3d47c"
