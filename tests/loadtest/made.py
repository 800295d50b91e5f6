"""Measurements made up for tests of what is done with them."""

from loadtest.report import Batches, Distribution, Generator, Host, Measurement, Plan, Report, Server

HOST = Host(cpu="abacus", cores=4, memory_bytes=2**30, load_average=0.1, platform="test", python="3.11")
SERVER = Server(
    url="http://127.0.0.1:1",
    started_here=False,
    on_this_host=True,
    model="bright 7",
    variant="fake",
    precision="fp32",
    engine="fake",
    settings={},
)


def plan(**changes: object) -> Plan:
    return Plan.model_validate(
        {"rate_rps": 10.0, "duration_s": 10.0, "warmup_s": 1.0, "seed": 0, "connections": 64} | changes
    )


def measurement(
    latencies_ms: list[float],
    failed: int = 0,
    throughput_rps: float | None = None,
    within_target: float | None = None,
    valid: bool = True,
    batches: Batches | None = None,
    **changes: object,
) -> Measurement:
    made = plan(**changes)
    latency = Distribution.of(latencies_ms)
    ordered = sorted(latencies_ms)
    return Measurement(
        plan=made,
        requests=len(latencies_ms) + failed,
        answered=len(latencies_ms),
        throughput_rps=len(latencies_ms) / made.duration_s if throughput_rps is None else throughput_rps,
        latency_ms=latency,
        latency_curve_ms=tuple(ordered[round(step / 100 * (len(ordered) - 1))] for step in range(101))
        if ordered
        else (),
        within_target=within_target,
        service_ms=latency,
        errors={"429 queue_full": failed} if failed else {},
        tries=len(latencies_ms) + failed,
        stages_ms={} if latency is None else {"decode": latency, "inference": latency},
        batches=batches,
        generator=Generator(cpu_cores=0.1, lateness_ms=None, in_flight_peak=3, waited_for_connection=0),
        server_cpu=None,
        valid=valid,
        remarks=() if valid else ("the generator fell behind",),
    )


def report(*measurements: Measurement, **changes: object) -> Report:
    return Report.model_validate(
        {
            "kind": "open loop",
            "ddetr_version": "0",
            "started_at": "2026-01-01T00:00:00+00:00",
            "command": ("--rate", "10"),
            "host": HOST,
            "server": SERVER,
            "pictures": "none",
            "measurements": measurements,
        }
        | changes
    )
