from collections.abc import Sequence

import numpy as np
import pytest

from bundle import Canvas
from server.engine import RawDetections, run_engine
from server.isolate import EngineDied, Part, infer_each
from server.preprocess import Pixels
from tests.server.fake_engine import POISON, FakeEngine

CANVAS = Canvas(height=64, width=96)


def black() -> Pixels:
    return np.zeros((64, 96, 3), np.uint8)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def grey(level: int) -> Pixels:
    return np.full((64, 96, 3), level, np.uint8)


def answers(engine: FakeEngine, levels: Sequence[int]) -> dict[int, RawDetections | BaseException]:
    """By slot."""
    found = {}
    for part in infer_each(lambda images: run_engine(engine, images, CANVAS), [grey(level) for level in levels], black):
        for slot in range(part.slots.start, part.slots.stop):
            assert slot not in found
            found[slot] = part.answer
    return found


def test_a_good_batch_is_one_call(engine: FakeEngine) -> None:
    assert [isinstance(answer, RawDetections) for answer in answers(engine, [1, 2, 3]).values()] == [True] * 3
    assert engine.batches == [(3, CANVAS)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
def test_whatever_images_an_engine_raises_on_fail_alone(size: int) -> None:
    for bad in range(2**size) if size < 5 else (0b1, 0b1000000, 0b0101010, 0b1111111):
        levels = [POISON if bad >> slot & 1 else 1 for slot in range(size)]
        found = answers(FakeEngine(), levels)
        assert sorted(found) == list(range(size))
        for slot, level in enumerate(levels):
            assert isinstance(found[slot], RuntimeError if level == POISON else RawDetections)


def test_a_blank_picture_tells_a_bad_image_from_a_dead_engine(engine: FakeEngine) -> None:
    answers(engine, [1, POISON])
    assert [size for size, _ in engine.batches] == [2, 1, 1, 1, 1]  # both, blank; the good one; the bad one, blank
    engine.trouble = "raise"
    with pytest.raises(EngineDied, match="RuntimeError: told to; on a blank picture: RuntimeError: told to"):
        answers(engine, [1, 2])


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        ("nan", "values that are not finite"),
        ("shape", r"boxes have shape \[1, 3, 4\], expected \[1, 2, 4\]"),
        ("exit", "SystemExit: 3"),
        ("prepare", "told to"),
    ],
)
def test_wrong_answers_are_as_bad_as_none(engine: FakeEngine, trouble: str, why: str) -> None:
    engine.trouble = trouble
    with pytest.raises(EngineDied, match=why):
        answers(engine, [1])


def test_what_was_found_before_an_engine_dies_is_not_lost(engine: FakeEngine) -> None:
    def die_in_the_end(_: int) -> None:
        if len(engine.batches) == 5:  # four raise, a blank picture, two are well, two raise, a blank picture
            engine.trouble = "raise"

    engine.on_infer = die_in_the_end
    parts: list[Part] = []
    with pytest.raises(EngineDied):
        parts.extend(
            infer_each(
                lambda images: run_engine(engine, images, CANVAS), [grey(1), grey(1), grey(POISON), grey(1)], black
            )
        )
    assert [part.slots for part in parts] == [slice(0, 2)]
