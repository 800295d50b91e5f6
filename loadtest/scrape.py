"""What the server's own /metrics say of the batches between two moments."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

BATCH_SIZE = "ddetr_batch_size"
BATCHES = "ddetr_batches"


@dataclass(frozen=True)
class Scrape:
    """The counters of batches at one moment."""

    batches: float = 0.0
    images: float = 0.0
    at_most: Mapping[float, float] = field(default_factory=dict)  # size to number of batches up to it
    reasons: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchesFormed:
    """Batches between two scrapes."""

    count: int
    images: int
    by_size: Mapping[str, int]  # "1", "2", "5-6"
    by_reason: Mapping[str, int]


def parse(exposition: str) -> Scrape | None:
    """The counters in a Prometheus text; None if it has none of batches."""
    batches = images = 0.0
    at_most: dict[float, float] = {}
    reasons: dict[str, float] = {}
    found = False
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.name == f"{BATCH_SIZE}_count":
                batches, found = sample.value, True
            elif sample.name == f"{BATCH_SIZE}_sum":
                images = sample.value
            elif sample.name == f"{BATCH_SIZE}_bucket":
                at_most[float(sample.labels["le"])] = sample.value
            elif sample.name == f"{BATCHES}_total":
                reasons[sample.labels["reason"]] = sample.value
    return Scrape(batches, images, at_most, reasons) if found else None


def between(before: Scrape | None, after: Scrape | None) -> BatchesFormed | None:
    """What was formed from `before` to `after`; None if one is missing or the server was started anew between them."""
    if before is None or after is None or after.batches < before.batches:
        return None
    by_size = {}
    reached, smaller = 0.0, 0.0
    for size, number in sorted(after.at_most.items()):
        grown = number - before.at_most.get(size, 0.0)
        if grown > reached:
            by_size[_name(smaller, size)] = round(grown - reached)
        reached, smaller = max(reached, grown), size
    by_reason = {
        reason: round(number - before.reasons.get(reason, 0.0))
        for reason, number in sorted(after.reasons.items())
        if number > before.reasons.get(reason, 0.0)
    }
    return BatchesFormed(round(after.batches - before.batches), round(after.images - before.images), by_size, by_reason)


def _name(above: float, up_to: float) -> str:
    """A bucket's sizes: those above the last bucket's limit, up to its own."""
    first = int(above) + 1
    if up_to == float("inf"):
        return f"{first} or more"
    return f"{first}" if first == int(up_to) else f"{first}-{int(up_to)}"
