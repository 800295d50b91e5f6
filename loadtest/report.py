"""The report of a load test: a JSON document with a version. `ddetr bench --schema` prints its JSON Schema.

Units are in the names: `_ms`, `_s`, `_rps` (requests a second; a request is one picture). A percentile is by nearest
rank: p99 is the least value that 99 in 100 do not exceed.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION: Final = 1
CURVE_STEPS = 100

Kind = Literal["open loop", "closed loop", "saturation and open loop", "rate search", "tuning"]
SearchPhase = Literal["doubling", "halving", "bisection", "confirmation"]
TrialPhase = Literal["start", "threads", "batch size", "delay", "confirmation"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Distribution(_Record):
    """How a quantity is distributed over requests."""

    count: int = Field(description="how many values")
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self | None:
        """Of these values, rounded to a thousandth; None if there are none."""
        ordered = sorted(values)
        if not ordered:
            return None
        found = {f"p{rank}": percentile(ordered, rank) for rank in (50, 90, 95, 99)}
        found |= {"mean": math.fsum(ordered) / len(ordered), "max": ordered[-1]}
        return cls(count=len(ordered), **{name: round(value, 3) for name, value in found.items()})


def percentile(ordered: Sequence[float], rank: float) -> float:
    """By nearest rank, of values in ascending order, at least one; `rank` in 0..100."""
    # Rounded first: 99 / 100 * 100 must not become the 100th by an error in the last digit.
    return ordered[max(0, math.ceil(round(rank / 100 * len(ordered), 9)) - 1)]


class Host(_Record):
    """The machine that the load came from."""

    cpu: str
    cores: int = Field(description="that this process may use")
    memory_bytes: int | None
    load_average: float = Field(description="of one minute, before the test began")
    platform: str
    python: str


class Server(_Record):
    """The server under test, as it describes itself."""

    url: str
    started_here: bool = Field(description="whether the load test started it, and stopped it afterwards")
    on_this_host: bool = Field(description="whether it shares its machine with the load generator")
    model: str = Field(description="name and version of the model")
    variant: str
    precision: str
    engine: str
    settings: dict[str, str] = Field(description="of a server started here, without keys; of others nothing is known")


class Plan(_Record):
    """How a load is made. Exactly one of `rate_rps` and `concurrency` is set."""

    rate_rps: float | None = Field(
        default=None, gt=0, description="open loop: requests arrive at this rate, as a Poisson process"
    )
    concurrency: int | None = Field(
        default=None, ge=1, description="closed loop: so many clients, each waiting for its answer before it goes on"
    )
    duration_s: float = Field(gt=0, description="of what is measured")
    warmup_s: float = Field(ge=0, description="the same load before it, not measured")
    seed: int = Field(description="of arrivals and of the choice of pictures")
    connections: int = Field(ge=1, description="most connections at once")
    target_ms: float | None = Field(default=None, gt=0, description="requests answered within it are counted")
    timeout_ms: float | None = Field(default=None, gt=0, description="sent as X-Timeout-Ms")
    priority: Literal["interactive", "batch"] | None = Field(default=None, description="sent as X-Priority")
    retries: int = Field(default=0, ge=0, description="most further tries after a 429 or 503 that has a Retry-After")


class Batches(_Record):
    """The batches that the server formed, from its /metrics before and after."""

    count: int
    mean_size: float
    by_size: dict[str, int] = Field(description="size, or range of sizes, to number of batches")
    by_reason: dict[str, int] = Field(description="why they left the queue: full, delay, idle, drain")


class Generator(_Record):
    """How the load generator itself fared."""

    cpu_cores: float = Field(description="cores it kept busy: 0.1 is a tenth of one core")
    lateness_ms: Distribution | None = Field(description="open loop: how long after it was due a request was sent")
    in_flight_peak: int = Field(description="most requests on their way at once")
    waited_for_connection: int = Field(description="requests that found all connections taken")


class ServerCpu(_Record):
    """CPU time of the server's process, where it was started here."""

    cores: float = Field(description="cores it kept busy")
    ms_per_request: float | None = Field(description="per answered request")


class Measurement(_Record):
    """One load, and how it was borne. Counted are the requests that were due after the warm-up."""

    plan: Plan
    requests: int = Field(description="due in the measured time")
    answered: int = Field(description="of these, answered with 200")
    throughput_rps: float = Field(description="answers with 200 that came within the measured time, a second")
    latency_ms: Distribution | None = Field(
        description="of answered requests, from the moment they were due to the last byte of the answer"
    )
    latency_curve_ms: tuple[float, ...] = Field(
        description=f"the same at 0, {100 / CURVE_STEPS:g}, ... 100 percent; empty where none was answered"
    )
    within_target: float | None = Field(
        description="share of all requests, failed ones included, that were answered within `target_ms`"
    )
    service_ms: Distribution | None = Field(description="of answered requests, from the moment they were sent")
    errors: dict[str, int] = Field(description="requests without boxes: HTTP status and error code, or what broke")
    tries: int = Field(description="requests sent for them, tries after a Retry-After included")
    stages_ms: dict[str, Distribution] = Field(description="by stage of the server, from the Server-Timing header")
    batches: Batches | None = Field(description="null where the server shows no metrics")
    generator: Generator
    server_cpu: ServerCpu | None
    valid: bool = Field(description="false where the generator, not the server, set the figures")
    remarks: tuple[str, ...] = Field(description="what a reader of the figures should know")


class RateStep(_Record):
    """One rate that was tried."""

    rate_rps: float
    phase: SearchPhase
    holds: bool
    within_target: float = Field(description="share of all requests answered within the target")
    measurement: int = Field(description="index into `measurements`")


class RateSearch(_Record):
    """The search for the highest rate that holds a latency target."""

    p99_ms: float = Field(description="the target: 99 of 100 requests are answered within it")
    precision: float = Field(description="how near the highest rate that held and the lowest that did not are brought")
    rate_rps: float | None = Field(
        description="the highest rate that held, and held when tried again; null if none did"
    )
    stopped: str = Field(description="why the search ended")
    steps: tuple[RateStep, ...]


class Candidate(_Record):
    """Settings of a server that are tried together."""

    engine_instances: int = Field(ge=1)
    engine_threads: int = Field(ge=0)
    max_batch_size: int = Field(ge=1)
    max_delay_ms: float = Field(ge=0)

    def environment(self) -> dict[str, str]:
        """As variables DDETR_*."""
        return {f"DDETR_{name.upper()}": f"{value:g}" for name, value in self}

    def flags(self) -> list[str]:
        """As flags of `ddetr serve`."""
        return [part for name, value in self for part in (f"--{name.replace('_', '-')}", f"{value:g}")]


class Trial(_Record):
    """What one candidate gave."""

    candidate: Candidate
    phase: TrialPhase
    score: float | None = Field(
        description="what candidates are compared by, see `Tuning.goal`; more is better. null for delays, which are "
        "compared by p95 at one rate, and for what could not be tried"
    )
    throughput_rps: float | None = Field(description="of the measurement that decided")
    latency_ms: Distribution | None = Field(description="of the measurement that decided")
    mean_batch_size: float | None = Field(description="of the measurement that decided")
    remark: str = ""


class Tuning(_Record):
    """The search for good settings of a server on this host."""

    goal: str = Field(description="what the score is")
    chosen: Candidate
    gain: float | None = Field(
        description="score of the chosen settings over that of the first, measured in turns; 1 where they stayed, null "
        "where the first had none"
    )
    trials: tuple[Trial, ...]


class Report(_Record):
    """A load test."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Kind
    ddetr_version: str
    started_at: str = Field(description="ISO 8601, UTC")
    command: tuple[str, ...] = Field(description="as it was typed, after `ddetr bench`")
    host: Host
    server: Server
    pictures: str = Field(description="what was sent")
    measurements: tuple[Measurement, ...]
    search: RateSearch | None = None
    tuning: Tuning | None = None

    @property
    def valid(self) -> bool:
        """Whether all that was measured is the server's."""
        return all(measurement.valid for measurement in self.measurements)
