"""A report as a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loadtest.report import CURVE_STEPS, Measurement, RateSearch, Report, Tuning

_SIZE_INCHES = (11.0, 4.6)
_DPI = 110
_COLOURS = {"p50": "#2a9d8f", "p95": "#e9a23b", "p99": "#d1495b"}
_STAGE_COLOURS = ("#8d99ae", "#2a9d8f", "#56b4a9", "#e9a23b", "#d1495b", "#6d597a")
_REFUSED = "#bbbbbb"
_CHOSEN = "#2a9d8f"


def plot(report: Report, path: Path) -> None:
    """Write the picture of the report, a PNG or whatever the name's ending says.

    Of single loads: how latency is distributed, and where it was spent. Of a search: percentiles over the rate, and
    batch sizes. Of a tuning: what was tried.
    """
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    if report.tuning is not None:
        _trials(left, report.tuning)
        _stages(right, report.measurements[-1:])
    elif report.search is not None:
        _percentiles_over_rate(left, report.search, report.measurements)
        _batches_over_rate(right, report.search, report.measurements)
    else:
        _distributions(left, report.measurements)
        _stages(right, report.measurements)
    figure.suptitle(f"{report.server.model} on {report.server.engine}", fontsize=10)
    figure.savefig(path)


def load_name(measurement: Measurement) -> str:
    """The load, for a legend."""
    plan = measurement.plan
    return f"{plan.rate_rps:.4g}/s" if plan.rate_rps is not None else f"{plan.concurrency} clients"


def _distributions(axes: Axes, measurements: Sequence[Measurement]) -> None:
    shares = [100 * step / CURVE_STEPS for step in range(CURVE_STEPS + 1)]
    for measurement in measurements:
        if measurement.latency_curve_ms:
            axes.step(measurement.latency_curve_ms, shares, where="post", label=load_name(measurement))
    last = measurements[-1].latency_ms
    if last is not None:
        for name, colour in _COLOURS.items():
            value = getattr(last, name)
            axes.axvline(value, color=colour, linewidth=0.8, linestyle="--", label=f"{name} {value:.0f} ms")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="lower right")
    axes.set(xlabel="latency since the request was due, ms", ylabel="answered within it, %", ylim=(0, 101))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)


def _stages(axes: Axes, measurements: Sequence[Measurement]) -> None:
    for row, measurement in enumerate(measurements):
        left = 0.0
        for (name, found), colour in zip(measurement.stages_ms.items(), _STAGE_COLOURS, strict=False):
            axes.barh(row, found.mean, 0.5, left=left, color=colour, label=name if row == 0 else None)
            left += found.mean
    axes.set_yticks(range(len(measurements)), [load_name(measurement) for measurement in measurements])
    axes.set(xlabel="mean time in the server by stage, ms", ylim=(-0.6, len(measurements) + 0.2))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, ncols=3, loc="upper center")


def _percentiles_over_rate(axes: Axes, search: RateSearch, measurements: Sequence[Measurement]) -> None:
    steps = sorted(search.steps, key=lambda step: step.rate_rps)
    for name, colour in _COLOURS.items():
        found = [(step, measurements[step.measurement].latency_ms) for step in steps]
        points = [(step.rate_rps, getattr(latency, name)) for step, latency in found if latency is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=name)
    for step in steps:
        if not step.holds:
            axes.axvline(step.rate_rps, color=_REFUSED, linewidth=0.8, linestyle=":")
    axes.axhline(search.p99_ms, color="black", linewidth=0.8, linestyle="--", label=f"target {search.p99_ms:g} ms")
    if search.rate_rps is not None:
        axes.axvline(search.rate_rps, color=_CHOSEN, linewidth=1.2, label=f"holds {search.rate_rps:.4g}/s")
    axes.set(xlabel="requests a second", ylabel="latency since the request was due, ms", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")


def _batches_over_rate(axes: Axes, search: RateSearch, measurements: Sequence[Measurement]) -> None:
    steps = sorted(search.steps, key=lambda step: step.rate_rps)
    rates = [step.rate_rps for step in steps]
    answered = [measurements[step.measurement].throughput_rps for step in steps]
    axes.plot(rates, answered, marker="o", markersize=4, color="#33658a", label="answered a second")
    axes.plot(rates, rates, color=_REFUSED, linewidth=0.8, label="asked a second")
    axes.set(xlabel="requests a second", ylabel="answers a second")
    axes.legend(fontsize=8, loc="upper left")
    sizes = [(step.rate_rps, measurements[step.measurement].batches) for step in steps]
    points = [(rate, batches.mean_size) for rate, batches in sizes if batches is not None]
    if points:
        beside = axes.twinx()
        beside.plot(*zip(*points, strict=True), marker="s", markersize=4, color="#e9a23b", label="images a batch")
        beside.set_ylabel("images a batch")
        beside.set_ylim(bottom=0)
        beside.legend(fontsize=8, loc="lower right")


def _trials(axes: Axes, tuning: Tuning) -> None:
    scored = [(trial, trial.score) for trial in tuning.trials if trial.score is not None]
    names = [
        f"{trial.candidate.engine_instances} x {trial.candidate.engine_threads or 'all'} threads, "
        f"batch {trial.candidate.max_batch_size}"
        for trial, _ in scored
    ]
    colours = [_CHOSEN if trial.candidate == tuning.chosen else "#8d99ae" for trial, _ in scored]
    axes.barh(range(len(scored)), [score for _, score in scored], color=colours)
    axes.set_yticks(range(len(scored)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=tuning.goal)
