from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from loadtest.scrape import Scrape, between, parse


class Site:
    """Metrics of the names and buckets that a server has."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.sizes = Histogram("ddetr_batch_size", "", buckets=(1, 2, 3, 4, 6, 8), registry=self.registry)
        self.reasons = Counter("ddetr_batches", "", ["reason"], registry=self.registry)
        self.reasons.labels("drain")

    def form(self, *sizes: int, reason: str = "full") -> Scrape | None:
        for size in sizes:
            self.sizes.observe(size)
            self.reasons.labels(reason).inc()
        return parse(generate_latest(self.registry).decode())


def test_only_batches_between_the_two_count() -> None:
    site = Site()
    before = site.form(1, 4, 6, 7, 8)
    after = site.form(1, 1, 4, 5, 6, 20, reason="idle")
    formed = between(before, after)
    assert formed is not None
    assert (formed.count, formed.images) == (6, 37)
    assert dict(formed.by_size) == {"1": 2, "4": 1, "5-6": 2, "9 or more": 1}
    assert dict(formed.by_reason) == {"idle": 6}


def test_no_batches_are_no_batches() -> None:
    site = Site()
    formed = between(site.form(), site.form())
    assert formed is not None
    assert (formed.count, dict(formed.by_size), dict(formed.by_reason)) == (0, {}, {})


def test_a_server_started_anew_or_without_metrics_says_nothing() -> None:
    assert between(Site().form(1, 2), Site().form(1)) is None
    assert parse("# HELP other_total x\n# TYPE other_total counter\nother_total 3\n") is None
    assert between(None, Site().form()) is None
