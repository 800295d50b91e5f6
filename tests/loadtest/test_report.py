import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from loadtest.report import Candidate, Distribution, Report, percentile
from tests.loadtest.made import measurement, report


def test_percentiles_are_by_nearest_rank() -> None:
    ordered = [float(value) for value in range(1, 101)]
    assert [percentile(ordered, rank) for rank in (0, 1, 50, 99, 99.5, 100)] == [1, 1, 50, 99, 100, 100]
    assert percentile([7.0], 99) == 7
    assert percentile([1.0, 2.0], 50) == 1
    assert percentile([1.0, 2.0], 51) == 2


@pytest.mark.parametrize("number", [100, 200, 300, 700, 1000, 12_300])
def test_p99_leaves_exactly_one_in_a_hundred_above(number: int) -> None:
    ordered = [float(value) for value in range(number)]
    assert sum(value > percentile(ordered, 99) for value in ordered) == number // 100


def test_a_distribution() -> None:
    found = Distribution.of([3.0, 1.0, 2.0, 10.0004])
    assert found == Distribution(count=4, mean=4.0, p50=2.0, p90=10.0, p95=10.0, p99=10.0, max=10.0)
    assert Distribution.of([]) is None


def test_a_report_is_read_back_as_it_was_written() -> None:
    written = report(measurement([10.0, 20.0, 30.0], failed=1))
    assert Report.model_validate_json(written.model_dump_json()) == written


def test_a_report_of_another_version_or_with_unknown_fields_is_refused() -> None:
    content = json.loads(report(measurement([1.0])).model_dump_json())
    for change in ({"schema_version": 2}, {"surplus": 1}):
        with pytest.raises(ValidationError, match=next(iter(change))):
            Report.model_validate(content | change)


def properties(schema: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for record, definition in {"Report": schema, **schema["$defs"]}.items():
        for name, field in definition.get("properties", {}).items():
            yield record, name, field


# Their names say it all.
PLAIN = {
    *("mean", "p50", "p90", "p95", "p99", "max"),
    *("cpu", "memory_bytes", "platform", "python", "url", "variant", "precision", "engine", "model"),
    *("count", "mean_size", "plan", "generator", "server_cpu", "holds", "rate_rps", "phase", "steps", "candidate"),
    *("engine_instances", "engine_threads", "max_batch_size", "max_delay_ms", "remark", "chosen", "trials"),
    *("schema_version", "kind", "ddetr_version", "host", "server", "measurements", "search", "tuning"),
}


def test_the_schema_explains_its_fields() -> None:
    schema = Report.model_json_schema()
    silent = {name for _, name, field in properties(schema) if "description" not in field}
    assert silent <= PLAIN
    assert all("description" in definition for definition in schema["$defs"].values())
    assert schema["properties"]["schema_version"]["const"] == 1


def test_a_report_is_as_valid_as_its_measurements() -> None:
    assert report(measurement([1.0]), measurement([1.0])).valid
    assert not report(measurement([1.0]), measurement([1.0], valid=False)).valid


def test_a_candidate_as_variables_and_flags() -> None:
    candidate = Candidate(engine_instances=2, engine_threads=0, max_batch_size=16, max_delay_ms=2.5)
    assert candidate.environment() == {
        "DDETR_ENGINE_INSTANCES": "2",
        "DDETR_ENGINE_THREADS": "0",
        "DDETR_MAX_BATCH_SIZE": "16",
        "DDETR_MAX_DELAY_MS": "2.5",
    }
    assert " ".join(candidate.flags()) == (
        "--engine-instances 2 --engine-threads 0 --max-batch-size 16 --max-delay-ms 2.5"
    )
