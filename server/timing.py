"""An image's stage times. They lie end to end, so that their sum is the request's time in the server."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds an image spent in each stage; waiting for a stage's thread counts to the stage."""

    admit: float = 0.0  # until the body is read and taken apart
    decode: float = 0.0
    preprocess: float = 0.0
    queue: float = 0.0
    inference: float = 0.0
    postprocess: float = 0.0


STAGES = tuple(field.name for field in fields(StageTimes))


def slowest(times: list[StageTimes]) -> StageTimes:
    """By stage, the longest of several images' times."""
    return StageTimes(**{stage: max((getattr(each, stage) for each in times), default=0.0) for stage in STAGES})


def server_timing(times: StageTimes) -> str:
    """The value of the Server-Timing header."""
    return ", ".join(f"{stage};dur={getattr(times, stage):.2f}" for stage in STAGES)
