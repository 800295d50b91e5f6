import io

import numpy as np
from PIL import Image

from server.draw import color_of, draw_detections, encode_png
from server.postprocess import Detection

BOX = Detection("red", 1, 0.9, (100.0, 120.0, 200.0, 220.0))


def test_outline_lies_on_the_boxs_edges_and_its_inside_stays_visible() -> None:
    picture = Image.new("RGB", (320, 240), (10, 10, 10))
    drawn = np.asarray(draw_detections(picture, [BOX]))
    for x, y in ((100, 150), (199, 150), (150, 219)):
        assert tuple(drawn[y, x]) == color_of(1)
    assert drawn[170, 150].max() < 60
    assert (drawn[:80, :] == 10).all()
    assert (np.asarray(picture) == 10).all()  # the picture itself is left alone


def test_label_is_above_the_box_or_inside_it_at_the_top_and_never_outside() -> None:
    picture = Image.new("RGB", (320, 240))
    above = np.asarray(draw_detections(picture, [BOX]))
    assert tuple(above[119, 101]) == color_of(1)
    corner = Detection("a very long name of a class", 2, 0.9, (250.0, 0.0, 320.0, 100.0))
    inside = np.asarray(draw_detections(picture, [corner]))
    assert inside[1, 150:250].any()


def test_tiny_pictures_and_boxes_can_be_drawn() -> None:
    for size in ((1, 1), (3, 2), (5000, 7)):
        box = (0.0, 0.0, size[0] / 1000, size[1] / 1000)
        drawn = draw_detections(Image.new("RGB", size), [Detection("x", 3, 0.5, box)])
        assert drawn.size == size


def test_names_in_any_script_can_be_drawn() -> None:
    draw_detections(Image.new("RGB", (50, 50)), [Detection("Zelle äöü 細胞 \U0001f9eb", 1, 0.5, (1, 1, 40, 40))])


def test_png_keeps_every_pixel() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(picture)))), np.asarray(picture))
