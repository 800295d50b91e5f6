"""A new bundle's engine is shown live pictures first, and no live request notices."""

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from bundle import ResizeRule, canvases_for
from server.engine import RawDetections, RawImageDetections
from server.metrics import Metrics
from server.preprocess import Pixels, preprocess
from server.served import Opened, Served
from server.settings import Settings
from server.shadow import Comparison, Shadow, agreement
from tests.server.fake_engine import MANIFEST, POISON, FakeEngine, Inputs
from tests.server.pictures import GREEN, RED, encode, rectangle
from tests.server.swap_site import FIRST, KEY, SwapSite, run

NAMES = {1: "red", 2: "green"}
LEFT, RIGHT = (0.0, 0.0, 0.4, 1.0), (0.6, 0.0, 1.0, 1.0)
PICTURE = np.full((40, 60, 3), 200, np.uint8)
RULE = ResizeRule(shortest=128, longest=192)
OTHER_SIZE = MANIFEST.model_copy(update={"resize": RULE, "canvases": canvases_for(RULE)})


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


def test_what_can_be_no_partner_takes_no_time() -> None:
    """It would hold the event loop up: an answer has hundreds of detections, nearly all of them weak."""

    class Counted(dict[int, str]):
        asked = 0

        def get(self, key: int, default: Any = None) -> Any:
            self.asked += 1
            return super().get(key, default)

    names = Counted(NAMES)
    found = answer((LEFT, 0.9, 1), *[(LEFT, 0.29, 1)] * 299)
    assert agreement(found, names, found, names) == 1.0
    assert names.asked <= 2


class Trial:
    """A shadow of a bundle beside another one that answers, and what live requests do with it."""

    def __init__(self, engine: FakeEngine, percent: float = 100.0) -> None:
        settings, self.metrics = Settings(bundle="none"), Metrics()  # type: ignore[arg-type]
        self.engine = engine
        self.live = Served(Opened([FakeEngine()]), settings, self.metrics, lambda: 0.0)
        self.served = Served(Opened([engine]), settings, self.metrics, lambda: 0.0)
        self.shadow = Shadow(self.served, percent, 0.8, self.metrics, lambda: 0.0)

    def show(self, picture: Pixels = PICTURE, given: RawImageDetections | None = None) -> bool:
        """A live request from its picture to its answer; whether the picture was wanted."""
        copy = self.shadow.want(self.live)
        if copy is not None:
            copy.keep(picture, *preprocess(picture, MANIFEST))
            copy.show(answer() if given is None else given)
            copy.leave()
        return copy is not None


def in_loop(test: Callable[[Trial], Awaitable[None]], engine: FakeEngine | None = None, percent: float = 100) -> None:
    async def body() -> None:
        trial = Trial(engine or FakeEngine(), percent)
        try:
            async with asyncio.timeout(30):
                await test(trial)
        finally:
            trial.engine.gate.set()
            trial.shadow.stop()
            for served in (trial.live, trial.served):
                await served.close()

    asyncio.run(body())


@pytest.mark.parametrize(("percent", "expected"), [(100, 40), (50, 20), (10, 4), (2.5, 1), (0.5, 0)])
def test_so_many_percent_are_wanted(percent: float, expected: int) -> None:
    async def test(trial: Trial) -> None:
        shown = 0
        for _ in range(40):
            if (copy := trial.shadow.want(trial.live)) is not None:
                shown += 1
                copy.leave()
        assert shown == expected

    in_loop(test, percent=percent)


def test_what_the_shadow_itself_answers_is_not_shown_to_it() -> None:
    async def test(trial: Trial) -> None:
        assert trial.shadow.want(trial.served) is None
        assert trial.shadow.want(trial.live) is not None

    in_loop(test)


def test_what_comes_while_it_is_busy_is_dropped_and_nothing_waits() -> None:
    async def test(trial: Trial) -> None:
        trial.engine.gate.clear()
        assert sum(trial.show() for _ in range(20)) == 4
        assert trial.shadow.so_far.dropped == 16
        await asyncio.to_thread(trial.engine.entered.acquire)
        trial.engine.gate.set()
        while trial.shadow.so_far.compared < 4:
            await asyncio.sleep(0)
        assert trial.shadow.so_far == Comparison(4, 4, 0, 16, 0, 0.0)
        assert [size for size, _ in trial.engine.batches] == [1] * 4, "one at a time"
        assert trial.show()

    in_loop(test)


def test_places_come_back_however_a_picture_ends() -> None:
    async def test(trial: Trial) -> None:
        for number in range(50):
            copy = trial.shadow.want(trial.live)
            assert copy is not None
            if number % 2:
                picture = np.full((40, 60, 3), POISON if number % 3 else 200, np.uint8)
                copy.keep(picture, *preprocess(picture, MANIFEST))
                before = trial.shadow.so_far
                copy.show(answer())
                while trial.shadow.so_far == before:
                    await asyncio.sleep(0)
            copy.leave()
            copy.leave()
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    in_loop(test)


def test_at_rest_it_has_waited_for_the_engine_and_asks_nothing_more() -> None:
    async def test(trial: Trial) -> None:
        trial.engine.gate.clear()
        assert [trial.show() for _ in range(3)] == [True] * 3
        await asyncio.to_thread(trial.engine.entered.acquire)
        assert not await trial.shadow.rest(0.01)
        trial.engine.gate.set()
        assert await trial.shadow.rest(30)
        assert trial.shadow.want(trial.live) is None
        assert len(trial.engine.batches) == 1

    in_loop(test)


def test_a_large_picture_is_shown_as_the_engine_in_service_gets_it() -> None:
    async def test(trial: Trial) -> None:
        trial.show(np.full((4000, 4000, 3), 200, np.uint8))
        while not trial.shadow.so_far.compared:
            await asyncio.sleep(0)
        assert trial.shadow.so_far.too_large == 0

    in_loop(test)


def test_a_large_picture_is_counted_where_the_bundle_wants_it_in_another_size() -> None:
    async def test(trial: Trial) -> None:
        trial.show(np.zeros((4000, 4000, 3), np.uint8))
        trial.show()
        while not trial.shadow.so_far.compared:
            await asyncio.sleep(0)
        seen = trial.shadow.so_far
        assert (seen.compared, seen.too_large, seen.dropped) == (1, 1, 0)
        assert b'ddetr_shadow_images_total{outcome="too_large"} 1.0' in trial.metrics.exposition()
        await asyncio.sleep(0)
        assert [trial.show() for _ in range(4)] == [True] * 4, "its place came back"

    in_loop(test, FakeEngine(OTHER_SIZE))


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
        site.bundles.manifests["8"] = OTHER_SIZE
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


def test_engines_that_were_left_behind_hanging_are_counted_too() -> None:
    async def test(site: SwapSite) -> None:
        for version in ("8", "9", "10"):
            swapping = site.swap(f"/bundles/{version}", shadow_percent=100, shadow_seconds=60)
            await site.until(lambda: site.service.shadow is not None)
            hung = site.bundles.opened[version]
            hung.gate.clear()
            hung_too.append(hung)
            assert await site.version() == FIRST
            assert "its engine died or hung on a live picture" in (await swapping).text
        assert "3 openings or engines hang" in (await site.swap("/bundles/11")).text
        for engine in hung_too:
            engine.gate.set()
        await site.until(lambda: all(engine.closed for engine in hung_too))
        assert (await site.swap("/bundles/11")).status_code == 200

    hung_too: list[FakeEngine] = []
    run(test, stall_timeout_ms=100)


def test_a_trial_in_which_nothing_was_compared_promotes_nothing(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.manifests["8"] = OTHER_SIZE
        swapping = site.swap("/bundles/8", shadow_percent=100, shadow_seconds=60, min_agreement=0)
        await site.until(lambda: site.service.shadow is not None)
        large = encode(Image.new("RGB", (2400, 2400)))
        assert (await site.post(large)).status_code == 200
        clock.now_s = 61
        response = await swapping
        assert response.status_code == 422
        assert "no live picture was compared: 0 dropped (it was busy), 1 larger than 16 MiB, 0 failed" in response.text
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


# After the switch


async def switched(site: SwapSite, clock: Clock, pictures: int = 4, **more: object) -> "asyncio.Task[httpx2.Response]":
    """A swap whose new bundle has agreed with the old one so far, and is in service now."""
    swapping = await shown(site, pictures, **more)
    clock.now_s += 61
    await site.until(lambda: site.service.served.manifest.model.version == "8")
    await site.until(lambda: site.service.shadow is not None)
    return swapping


async def watched(site: SwapSite, count: int) -> None:
    """So many pictures are answered by the new bundle, and shown to the old one."""
    shadow = site.service.shadow
    assert shadow is not None
    for _ in range(count):
        before = shadow.so_far
        response = await site.post()
        assert (response.status_code, response.json()["model"]["version"]) == (200, "8")
        await site.until(lambda before=before: shadow.so_far != before)  # type: ignore[misc]


def test_a_bundle_that_disagrees_after_the_switch_makes_way_for_the_old_one(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(site: SwapSite) -> None:
        swapping = await switched(site, clock)
        await watched(site, 5)
        become(Mover)(site.bundles.opened["8"])
        new = weakref.ref(site.service.served)
        asked = 5
        while await site.version() == "8":
            asked += 1
            await asyncio.sleep(0.01)
        assert asked >= 20
        response = await swapping
        (swap,) = (await site.state())["swaps"]
        seen = swap["shadow_after"]
        assert (swap["state"], seen["compared"] >= 20, seen["disagreed"]) == ("rolled_back", True, seen["compared"] - 5)
        assert swap["shadow"]["agreement"] == 1.0
        why = f"over {seen['compared']} live pictures after the switch its answers agree with the old bundle's to 0."
        assert why in swap["reason"]
        assert response.status_code == 422
        assert f"rolled_back: {swap['reason']}" in response.json()["error"]["message"]
        assert await site.version() == FIRST
        assert site.bundles.opened["8"].closed
        assert not site.first.closed
        assert site.service.shadow is None
        text = await site.metrics()
        assert 'ddetr_bundle_swaps_total{outcome="rolled_back"} 1.0' in text
        assert f"rolled_back: {why}" in caplog.text
        assert await is_gone(new)

    run(test, rollback_seconds=3600)


def test_few_pictures_that_differ_are_a_reason_when_the_time_is_over_and_not_before(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        swapping = await switched(site, clock)
        become(Mover)(site.bundles.opened["8"])
        await watched(site, 3)
        await asyncio.sleep(0.25)  # some looks
        assert await site.version() == "8"
        clock.now_s += 3601
        assert "after the switch its answers agree" in (await swapping).text
        assert await site.version() == FIRST

    run(test, rollback_seconds=3600)


def test_a_bundle_that_agrees_after_the_switch_stays_and_the_old_one_is_let_go(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        old = weakref.ref(site.service.served)
        swapping = await switched(site, clock)
        await watched(site, 25)
        clock.now_s += 3601
        content = (await swapping).json()
        assert content["state"] == "promoted"
        assert (content["shadow_after"]["compared"], content["shadow_after"]["agreement"]) == (25, 1.0)
        assert site.first.closed
        assert site.service.shadow is None
        assert await site.version() == "8"
        assert await is_gone(old)

    run(test, rollback_seconds=3600)


async def is_gone(bundle: "weakref.ref[Served]") -> bool:
    """Whether nothing that was under way keeps it, once the service has looked after its engines again."""
    for _ in range(100):
        gc.collect()
        if bundle() is None:
            return True
        await asyncio.sleep(0.05)
    return False


def test_a_bundle_that_nobody_wanted_shown_is_not_held_against_the_old_one(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.on_open["8"] = become(Mover)
        swapping = site.swap("/bundles/8")
        await site.until(lambda: site.service.served.manifest.model.version == "8")
        for _ in range(25):
            assert await site.version() == "8"
        assert site.service.shadow is None
        clock.now_s += 3601
        content = (await swapping).json()
        assert (content["state"], content["shadow_after"]) == ("promoted", None)

    run(test, rollback_seconds=3600)


def test_an_old_engine_that_hangs_or_dies_after_the_switch_holds_nobody_up(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        swapping = await switched(site, clock)
        site.first.gate.clear()
        for _ in range(10):
            assert await site.version() == "8"
        shadow = site.service.shadow
        assert shadow is not None
        assert shadow.so_far.dropped >= 5
        clock.now_s += 3601
        await site.until(lambda: site.swaps.history[-1].state == "retiring")
        assert await site.version() == "8"
        site.first.gate.set()
        assert (await swapping).json()["state"] == "promoted"

    run(test, rollback_seconds=3600)


def test_what_ends_on_the_old_bundle_is_not_shown_to_it(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        swapping = await shown(site, 4)
        held = await site.hold()
        clock.now_s += 61
        site.first.gate.set()
        assert (await held).status_code == 200
        await site.until(lambda: site.service.served.manifest.model.version == "8")
        await site.until(lambda: site.service.shadow is not None)
        shadow = site.service.shadow
        assert shadow is not None
        assert shadow.want(site.service._beside[0]) is None
        clock.now_s += 3601
        await swapping

    run(test, rollback_seconds=3600)


def test_one_that_is_ended_while_its_last_picture_is_waited_for_is_not_switched_to(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        swapping = await shown(site, 4)
        engine = site.bundles.opened["8"]
        engine.gate.clear()
        assert await site.version() == FIRST
        clock.now_s = 61
        await site.until(lambda: site.service.shadow is None)
        assert (await site.client.delete("/admin/bundle", headers=KEY)).json()["state"] == "shadowing"
        engine.gate.set()
        assert "rejected: an administrator ended it" in (await swapping).text

    run(test)


def test_a_reload_is_tried_as_the_settings_say(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.on_open["8"] = become(Mover)
        site.swaps.reload("signal")
        await site.until(lambda: site.service.shadow is not None)
        shadow = site.service.shadow
        assert shadow is not None
        for number in range(1, 5):
            assert await site.version() == FIRST
            await site.until(lambda number=number: shadow.so_far.compared == number // 2)  # type: ignore[misc]
        clock.now_s = 31
        await site.until(lambda: not site.swaps.busy)
        (swap,) = (await site.state())["swaps"]
        assert (swap["state"], swap["shadow"]["compared"]) == ("rejected", 2)
        assert "asked for is 0.7" in swap["reason"]

    path = Path("/bundles/8")
    run(test, bundle=path, shadow_percent=50, shadow_seconds=30, min_agreement=0.7, rollback_seconds=0)


def test_a_request_may_ask_for_another_trial_than_the_settings_do(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        assert (await site.swap("/bundles/8", shadow_percent=0)).json()["shadow"] is None
        swapping = site.swap("/bundles/9")
        await site.until(lambda: site.service.shadow is not None)
        assert await site.version() == "8"
        clock.now_s = 31
        assert (await swapping).json()["shadow"]["compared"] == 1

    run(test, shadow_percent=100, shadow_seconds=30, rollback_seconds=0)


def test_an_administrator_ends_a_trial(clock: Clock) -> None:
    async def test(site: SwapSite) -> None:
        swapping = await shown(site, 1)
        begun = await site.client.delete("/admin/bundle", headers=KEY)
        assert (begun.status_code, begun.json()["state"]) == (202, "shadowing")
        assert "rejected: an administrator ended it" in (await swapping).text
        assert site.bundles.opened["8"].closed
        assert await site.version() == FIRST

    run(test)
