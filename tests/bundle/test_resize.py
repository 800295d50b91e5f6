import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundle import Canvas, CanvasError, ResizeRule, canvases_for, choose_canvas, resized_size

COCO = ResizeRule(shortest=800, longest=1333)
MOST_ELONGATED = 20  # longer than this, the official arithmetic leaves the canvases: held instead of followed


def official_size(height: int, width: int, size: int, max_size: int) -> tuple[int, int]:
    """The published `get_size_with_aspect_ratio`, restated as an oracle."""
    least, most = float(min(height, width)), float(max(height, width))
    if most / least * size > max_size:
        size = int(round(max_size * least / most))
    if (width <= height and width == size) or (height <= width and height == size):
        return height, width
    if width < height:
        return int(size * height / width), size
    return size, int(size * width / height)


@pytest.mark.parametrize(
    ("given_size", "expected"),
    [
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((427, 640), (800, 1199)),
        ((1080, 1920), (750, 1333)),
        ((800, 800), (800, 800)),
        ((1, 1), (800, 800)),
        ((1, 5000), (1, 1344)),
        ((5000, 1), (1344, 1)),
    ],
)
def test_resized_size(given_size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(*given_size, COCO) == expected


@given(height=st.integers(1, 6000), width=st.integers(1, 6000))
def test_official_arithmetic_and_a_canvas_for_every_size(height: int, width: int) -> None:
    size = resized_size(height, width, COCO)
    if max(height, width) <= MOST_ELONGATED * min(height, width):
        assert size == official_size(height, width, 800, 1333)
    choose_canvas(*size, canvases_for(COCO))


@given(
    sides=st.tuples(st.integers(16, 900), st.integers(16, 900)).map(sorted),
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
)
def test_default_canvases_hold_every_image_of_every_rule(sides: list[int], height: int, width: int) -> None:
    rule = ResizeRule(shortest=sides[0], longest=sides[1])
    choose_canvas(*resized_size(height, width, rule), canvases_for(rule))


def test_canvases_are_multiples_of_the_stride_in_both_orientations() -> None:
    assert [str(canvas) for canvas in canvases_for(COCO)] == [
        "800x800",
        "800x1088",
        "1088x800",
        "800x1344",
        "1344x800",
    ]


def test_smallest_canvas_wins() -> None:
    canvases = (Canvas(height=100, width=200), Canvas(height=100, width=100), Canvas(height=300, width=300))
    assert choose_canvas(90, 100, canvases) == Canvas(height=100, width=100)
    assert choose_canvas(90, 101, canvases) == Canvas(height=100, width=200)
    assert choose_canvas(101, 101, canvases) == Canvas(height=300, width=300)


def test_too_large_names_the_size_and_the_canvases() -> None:
    with pytest.raises(CanvasError, match=r"no canvas holds 101x90 pixels; there are 100x200"):
        choose_canvas(101, 90, (Canvas(height=100, width=200),))


def test_rule_in_disorder_is_refused() -> None:
    with pytest.raises(ValueError, match="shortest 10 exceeds longest 9"):
        ResizeRule(shortest=10, longest=9)


def test_no_size_is_refused() -> None:
    with pytest.raises(ValueError, match="0x5"):
        resized_size(0, 5, COCO)
