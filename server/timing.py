"""An image's stage times. They lie end to end, so that their sum is the request's time in the server."""

from collections.abc import Sequence
from typing import NamedTuple


class StageTimes(NamedTuple):
    """Milliseconds an image spent in each stage; waiting for a stage's thread counts to the stage."""

    admit: float = 0.0  # until the body is read and taken apart
    decode: float = 0.0
    preprocess: float = 0.0
    queue: float = 0.0
    inference: float = 0.0
    postprocess: float = 0.0  # until the answer is written

    @property
    def total(self) -> float:
        """Milliseconds in all stages."""
        return sum(self)


STAGES = StageTimes._fields


def slowest(times: Sequence[StageTimes]) -> StageTimes:
    """The times of the image that took longest, stage by stage what its request waited for."""
    return max(times, key=lambda each: each.total, default=StageTimes())


def until_answered(times: Sequence[StageTimes], request_ms: float) -> list[StageTimes]:
    """The times of a request's images, with what it took to answer it in postprocess.

    Whatever no stage has counted so far is in it, too: the slowest image's stages fill `request_ms`.
    """
    rest_ms = request_ms - slowest(times).total
    return [each._replace(postprocess=each.postprocess + rest_ms) for each in times]


def server_timing(times: StageTimes) -> str:
    """The value of the Server-Timing header."""
    return ", ".join([f"{stage};dur={ms:.2f}" for stage, ms in zip(STAGES, times, strict=True)])
