"""Finds out, when an engine raises, whether that is one image's fault or the engine's own."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from server.engine import RawDetections
from server.preprocess import Pixels

Infer = Callable[[Sequence[Pixels]], RawDetections]


class EngineDied(Exception):
    """The engine raises on anything."""


@dataclass(frozen=True, eq=False)
class Part:
    """The answer of some images of a batch that lie side by side, or why a single image has none."""

    slots: slice
    answer: RawDetections | BaseException


def infer_each(
    infer: Infer, images: Sequence[Pixels], blank: Callable[[], Pixels], first_slot: int = 0
) -> Iterator[Part]:
    """Run `images` as one batch; where the engine raises, by halves, until an image that it cannot take stands alone.

    After every failure the engine is asked for a `blank` picture: if it raises on that too, all are told EngineDied.
    """
    answer: RawDetections | BaseException | None
    try:
        answer = infer(images)
    except BaseException as error:  # a SystemExit of a library is an engine's failure like any other
        answer = error
    try:
        if isinstance(answer, BaseException):
            try:
                infer([blank()])
            except BaseException as error:
                raise EngineDied(f"{_describe(answer)}; on a blank picture: {_describe(error)}") from answer
            if len(images) > 1:
                half = len(images) // 2
                yield from infer_each(infer, images[:half], blank, first_slot)
                yield from infer_each(infer, images[half:], blank, first_slot + half)
                return
        yield Part(slice(first_slot, first_slot + len(images)), answer)
    finally:
        answer = None  # its traceback holds this frame, which holds the images


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
