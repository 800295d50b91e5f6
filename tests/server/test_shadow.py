"""A new bundle's engine is shown live pictures first, and no live request notices."""

import asyncio
import threading
from collections.abc import Callable

import httpx2
import numpy as np
import pytest
from PIL import Image

from bundle import ResizeRule, canvases_for
from server.engine import RawDetections, RawImageDetections
from server.metrics import Metrics
from server.shadow import Copy, Shadow, agreement
from tests.server.fake_engine import MANIFEST, FakeEngine, Inputs
from tests.server.pictures import GREEN, RED, encode, rectangle
from tests.server.swap_site import FIRST, SwapSite, run

NAMES = {1: "red", 2: "green"}
LEFT, RIGHT = (0.0, 0.0, 0.4, 1.0), (0.6, 0.0, 1.0, 1.0)
PICTURE = np.full((40, 60, 3), 200, np.uint8)


def answer(*found: tuple[tuple[float, float, float, float], float, int]) -> RawImageDetections:
    boxes = np.array([box for box, _, _ in found], np.float32).reshape(-1, 4)
    return RawImageDetections(
        boxes,
        np.array([score for _, score, _ in found], np.float32),
        np.array([label for *_, label in found], np.int64),
    )


def moved(box: tuple[float, float, float, float], by: float) -> tuple[float, float, float, float]:
    return (box[0] + by, box[1], box[2] + by, box[3])


def test_the_same_answer_agrees_and_so_do_two_empty_ones() -> None:
    one = answer((LEFT, 0.9, 1), (RIGHT, 0.8, 2))
    assert agreement(one, NAMES, one, NAMES) == 1.0
    assert agreement(answer(), NAMES, answer(), NAMES) == 1.0
    assert agreement(answer((LEFT, 0.2, 1)), NAMES, answer(), NAMES) == 1.0, "neither finds anything strong"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (answer((moved(LEFT, 0.05), 0.9, 1), (RIGHT, 0.8, 2)), 1.0),
        (answer((moved(LEFT, 0.3), 0.9, 1), (RIGHT, 0.8, 2)), 0.5),
        (answer((LEFT, 0.9, 2), (RIGHT, 0.8, 2)), 0.5),
        (answer((LEFT, 0.4, 1), (RIGHT, 0.8, 2)), 1.0),
        (answer((LEFT, 0.2, 1), (RIGHT, 0.8, 2)), 2 / 3),
        (answer(), 0.0),
        (answer((LEFT, 0.9, 1), (LEFT, 0.8, 1), (RIGHT, 0.8, 2)), 4 / 5),
    ],
    ids=["moved a little", "moved far", "another label", "weaker", "too weak", "nothing", "twice"],
)
def test_agreement_is_the_share_of_strong_detections_with_a_partner(other: RawImageDetections, expected: float) -> None:
    one = answer((LEFT, 0.9, 1), (RIGHT, 0.8, 2))
    assert agreement(one, NAMES, other, NAMES) == pytest.approx(expected)
    assert agreement(other, NAMES, one, NAMES) == pytest.approx(expected)


def test_labels_are_compared_by_name() -> None:
    renumbered = {7: "red", 1: "green"}
    assert agreement(answer((LEFT, 0.9, 1)), NAMES, answer((LEFT, 0.9, 7)), renumbered) == 1.0
    assert agreement(answer((LEFT, 0.9, 1)), NAMES, answer((LEFT, 0.9, 1)), renumbered) == 0.0


def shadow(engine: FakeEngine, percent: float = 100.0) -> Shadow:
    return Shadow(engine, percent, 0.8, Metrics())


def wanted(copy: Copy | None) -> Copy:
    assert copy is not None
    return copy


@pytest.mark.parametrize(("percent", "expected"), [(100, 40), (50, 20), (10, 4), (2.5, 1), (0.5, 0)])
def test_so_many_percent_are_wanted(percent: float, expected: int) -> None:
    shown = 0
    trial = shadow(FakeEngine(), percent)
    for _ in range(40):
        if (copy := trial.want()) is not None:
            shown += 1
            copy.leave()
    assert shown == expected
    trial.stop().result(30)


def test_what_comes_while_it_is_busy_is_dropped_and_nothing_waits() -> None:
    engine = FakeEngine()
    engine.gate.clear()
    trial = shadow(engine)
    for _ in range(20):
        if (copy := trial.want()) is not None:
            copy.keep(PICTURE)
            copy.show(answer(), NAMES)
            copy.leave()
    assert trial.so_far.dropped == 16
    engine.gate.set()
    trial.stop().result(30)
    seen = trial.so_far
    assert seen.compared <= 4
    assert (seen.failed, seen.dropped) == (0, 16)


def test_places_come_back_however_a_picture_ends() -> None:
    trial = shadow(FakeEngine())
    for number in range(50):
        copy = wanted(trial.want())
        if number % 2:
            copy.keep(PICTURE)
        if number % 3:
            done = threading.Event()
            copy.show(answer(), NAMES)
            trial._worker.submit(done.set)
            assert done.wait(30)
        copy.leave()
    seen = trial.so_far
    assert seen.compared + seen.dropped == 33
    trial.stop().result(30)


def test_a_picture_too_large_to_keep_is_dropped() -> None:
    trial = shadow(FakeEngine())
    copy = wanted(trial.want())
    copy.keep(np.zeros((4000, 4000, 3), np.uint8))
    copy.show(answer(), NAMES)
    copy.leave()
    trial.stop().result(30)
    assert (trial.so_far.compared, trial.so_far.dropped) == (0, 1)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr("server.promote._now_s", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def shown(site: SwapSite, count: int, **more: object) -> "asyncio.Task[httpx2.Response]":
    """A swap that has been shown so many pictures."""
    swapping = site.swap("/bundles/8", shadow_percent=100, shadow_seconds=60, **more)
    await site.until(lambda: site.service.shadow is not None)
    trial = site.service.shadow
    assert trial is not None
    for color in (RED, GREEN, RED, GREEN)[:count]:
        before = trial.so_far
        response = await site.post(encode(rectangle(color)))
        assert response.json()["model"]["version"] == FIRST
        await site.until(lambda before=before: trial.so_far != before)  # type: ignore[misc]
    return swapping


def test_a_bundle_that_agrees_is_promoted_after_its_time(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        swapping = await shown(site, 4)
        assert await site.version() == FIRST
        clock.now_s = 61
        content = (await swapping).json()
        assert content["state"] == "promoted"
        assert content["shadow"]["compared"] >= 4
        assert (content["shadow"]["disagreed"], content["shadow"]["agreement"]) == (0, 1.0)
        assert site.service.shadow is None
        assert await site.version() == "8"
        assert 'ddetr_shadow_images_total{outcome="disagreed"} 0.0' in await site.metrics()

    run(test)


class Mover(FakeEngine):
    """Finds everything elsewhere."""

    def finish(self, outputs: RawDetections) -> RawDetections:
        return RawDetections(1 - outputs.boxes[..., [2, 3, 0, 1]], outputs.scores, outputs.labels)


class Refuser(FakeEngine):
    """Takes no picture but the blank ones of the warm-up."""

    def infer(self, inputs: Inputs) -> RawDetections:
        if inputs.images.any():
            raise RuntimeError("told to")
        return super().infer(inputs)


def become(kind: type[FakeEngine]) -> Callable[[FakeEngine], None]:
    return lambda engine: setattr(engine, "__class__", kind)


def test_a_bundle_that_disagrees_is_not_promoted(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.on_open["8"] = become(Mover)
        swapping = await shown(site, 4)
        clock.now_s = 61
        response = await swapping
        assert response.status_code == 422
        assert "agree with those in service to 0.000, asked for is 0.8" in response.text
        assert await site.version() == FIRST
        assert site.bundles.opened["8"].closed
        assert 'ddetr_shadow_images_total{outcome="disagreed"} 4.0' in await site.metrics()

    run(test)


def test_how_much_must_agree_is_the_administrators_to_say(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.on_open["8"] = become(Mover)
        swapping = await shown(site, 4, min_agreement=0)
        clock.now_s = 61
        assert (await swapping).status_code == 200

    run(test)


def test_a_bundle_that_fails_on_live_pictures_ends_the_trial_early(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.on_open["8"] = become(Refuser)
        response = await (await shown(site, 3))
        assert "its engine failed on 3 of 3 live pictures" in response.text
        assert await site.version() == FIRST
        assert site.bundles.opened["8"].closed

    run(test)


def test_a_bundle_of_another_size_is_shown_the_picture_as_it_wants_it(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        rule = ResizeRule(shortest=128, longest=192)
        site.bundles.manifests["8"] = MANIFEST.model_copy(update={"resize": rule, "canvases": canvases_for(rule)})
        swapping = await shown(site, 4)
        clock.now_s = 61
        content = (await swapping).json()
        assert content["state"] == "promoted"
        assert content["shadow"]["agreement"] == 1.0

    run(test)


def test_an_engine_that_hangs_on_a_live_picture_holds_nobody_up(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.promote._REST_S", 0.05)

    async def test(site: SwapSite) -> None:
        swapping = site.swap("/bundles/8", shadow_percent=100, shadow_seconds=60)
        await site.until(lambda: site.service.shadow is not None)
        engine = site.bundles.opened["8"]
        engine.gate.clear()
        for _ in range(10):
            assert await site.version() == FIRST
        clock.now_s = 61
        assert "its engine hangs on a live picture" in (await swapping).text
        assert await site.version() == FIRST
        assert not engine.closed
        engine.gate.set()
        await site.until(lambda: engine.closed)

    run(test)


def test_engines_that_hang_in_a_trial_are_counted(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.promote._REST_S", 0.05)

    async def test(site: SwapSite) -> None:
        for version in ("8", "9", "10"):
            swapping = site.swap(f"/bundles/{version}", shadow_percent=100, shadow_seconds=60)
            await site.until(lambda: site.service.shadow is not None)
            site.bundles.opened[version].gate.clear()
            assert await site.version() == FIRST
            clock.now_s += 61
            assert "its engine hangs on a live picture" in (await swapping).text
        assert "3 openings or engines hang" in (await site.swap("/bundles/11")).text
        site.bundles.release()
        await site.until(lambda: all(site.bundles.opened[version].closed for version in ("8", "9", "10")))
        assert (await site.swap("/bundles/11")).status_code == 200

    run(test)


def test_a_trial_in_which_nothing_was_compared_promotes_nothing(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        swapping = site.swap("/bundles/8", shadow_percent=100, shadow_seconds=60, min_agreement=0)
        await site.until(lambda: site.service.shadow is not None)
        large = encode(Image.new("RGB", (2400, 2400)))
        assert (await site.post(large)).status_code == 200
        clock.now_s = 61
        response = await swapping
        assert response.status_code == 422
        assert "no live picture was compared: 1 dropped (it was busy, or they take more than 16 MiB)" in response.text
        assert site.bundles.opened["8"].closed
        assert await site.version() == FIRST

    run(test)


def test_draining_ends_a_trial(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        swapping = await shown(site, 1)
        site.service.drain()
        assert "the server is stopping" in (await swapping).text
        assert site.bundles.opened["8"].closed

    run(test)
