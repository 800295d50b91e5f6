from pathlib import Path

import pytest
from PIL import Image

from loadtest.plot import plot
from loadtest.report import Batches, Candidate, Report
from loadtest.search import Bounds, find_rate
from loadtest.tune import space_for, tune
from tests.loadtest.made import measurement, report
from tests.loadtest.test_tune import START, Surface

BATCHES = Batches(count=10, mean_size=2.5, by_size={"2": 5, "3": 5}, by_reason={"idle": 10})
LATENCIES = [float(value) for value in range(20, 120)]


def searched() -> Report:
    def measure(rate_rps: float, phase: str) -> object:
        batches = BATCHES if rate_rps > 5 else None
        latencies = LATENCIES if rate_rps < 30 else []
        return measurement(latencies, failed=3, within_target=float(rate_rps < 20), rate_rps=rate_rps, batches=batches)

    search, measurements = find_rate(measure, 200.0, Bounds(start_rps=4.0))  # type: ignore[arg-type]
    return report(*measurements, kind="rate search", search=search)


def tuned() -> Report:
    surface = Surface(lambda candidate: 10.0 + candidate.max_batch_size)
    tuning = tune(surface.serve, space_for(START, cores=2, on_gpu=False))
    return report(measurement(LATENCIES), kind="tuning", tuning=tuning)


REPORTS = {
    "open loop": lambda: report(measurement(LATENCIES)),
    "two loads": lambda: report(measurement(LATENCIES, rate_rps=None, concurrency=4), measurement(LATENCIES)),
    "nothing answered": lambda: report(measurement([], failed=4)),
    "search": searched,
    "search in vain": lambda: report(
        *searched().measurements, search=searched().search.model_copy(update={"rate_rps": None})
    ),  # type: ignore[union-attr]
    "tuning": tuned,
}


@pytest.mark.parametrize("name", REPORTS)
def test_every_kind_of_report_is_drawn(name: str, tmp_path: Path) -> None:
    plot(REPORTS[name](), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"
        colours = picture.convert("RGB").getcolors(maxcolors=2**20)
    assert colours is not None
    assert len(colours) > 20, "axes, lines and text"


def test_the_name_s_ending_says_what_is_written(tmp_path: Path) -> None:
    plot(report(measurement(LATENCIES)), tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


def test_candidates_are_told_apart_in_the_tuning() -> None:
    assert len({trial.candidate for trial in tuned().tuning.trials}) > 3  # type: ignore[union-attr]
    assert isinstance(tuned().tuning.chosen, Candidate)  # type: ignore[union-attr]
