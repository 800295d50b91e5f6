"""The paper's resize rule, and the fixed canvases that resized images are laid on."""

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bundle.errors import CanvasError

CANVAS_STEP_PX = 32
"""Canvas sides are multiples of this: the stride of the backbone's last stage."""


class ResizeRule(BaseModel):
    """Scale so that the shortest side is `shortest` px, unless the longest would exceed `longest` px."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shortest: int = Field(ge=1)
    longest: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> "ResizeRule":
        if self.shortest > self.longest:
            raise ValueError(f"shortest {self.shortest} exceeds longest {self.longest}")
        return self


class Canvas(BaseModel):
    """A fixed input size of the network, in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: int = Field(ge=1)
    width: int = Field(ge=1)

    def __hash__(self) -> int:
        return hash((self.height, self.width))  # pydantic's own takes ten times as long, and every image asks often

    def holds(self, height: int, width: int) -> bool:
        """Whether an image of this size fits without scaling."""
        return height <= self.height and width <= self.width

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def resized_size(height: int, width: int, rule: ResizeRule) -> tuple[int, int]:
    """Size (h, w) in pixels that an image of `height` x `width` is resized to.

    The official code's arithmetic, its truncations included (`get_size_with_aspect_ratio`). Where that arithmetic
    leaves the range a canvas can hold (it gives a side of 0 px, or one far past `longest`, for images more than
    some twenty times as long as wide), the side is held between 1 px and `longest` rounded up to a canvas side.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height}x{width} pixels has no size to resize")
    shorter, longer = float(min(height, width)), float(max(height, width))
    size = rule.shortest
    if longer / shorter * size > rule.longest:
        size = max(1, int(round(rule.longest * shorter / longer)))
    # The official expression, int(size * h / w) on integers: another order of operations truncates differently.
    other = min(int(size * max(height, width) / min(height, width)), round_up(rule.longest))
    return (size, other) if height <= width else (other, size)


def choose_canvas(height: int, width: int, canvases: Iterable[Canvas]) -> Canvas:
    """The canvas of smallest area that holds an image of `height` x `width` pixels.

    Raises CanvasError if none does.
    """
    canvases = tuple(canvases)
    fitting = [canvas for canvas in canvases if canvas.holds(height, width)]
    if not fitting:
        raise CanvasError(f"no canvas holds {height}x{width} pixels; there are {', '.join(map(str, canvases))}")
    return min(fitting, key=lambda canvas: (canvas.height * canvas.width, canvas.height))


def canvases_for(rule: ResizeRule, aspect_ratios: Sequence[float] = (1.0, 4 / 3)) -> tuple[Canvas, ...]:
    """Canvases, both orientations, such that every image resized by `rule` fits one.

    One canvas an aspect ratio (long side : short side), and one that holds all that is longer. More canvases pad
    less and batch less.
    """
    short = round_up(rule.shortest)
    longest = round_up(rule.longest)
    long_sides = {min(longest, round_up(int(rule.shortest * ratio))) for ratio in aspect_ratios} | {longest}
    sizes = {(short, long) for long in long_sides} | {(long, short) for long in long_sides}
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size[0]))
    return tuple(Canvas(height=height, width=width) for height, width in ordered)


def round_up(side_px: int) -> int:
    """The next canvas side at or above `side_px`."""
    return -(-side_px // CANVAS_STEP_PX) * CANVAS_STEP_PX
