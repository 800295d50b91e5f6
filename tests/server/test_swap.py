"""From one bundle to another: nothing is lost on the way, and what is bad never gets there."""

import asyncio
import threading
from pathlib import Path

import httpx2
import pytest

from bundle import HashMismatch, ResizeRule, canvases_for
from server.errors import ParityFailed
from server.gate import Verdict
from server.swap import Swap
from tests.server.fake_engine import MANIFEST, FakeEngine
from tests.server.pictures import RED, encode, poison, rectangle
from tests.server.swap_site import FIRST, KEY, SwapSite, run
from tests.server.test_load import PNG
from tests.server.test_service import Sender
from tests.server.tiny_bundle import write_tiny_bundle


def outcome(swap: Swap) -> tuple[str, str]:
    return swap.path, swap.state


def test_a_request_under_way_ends_on_the_bundle_it_came_to() -> None:
    async def test(site: SwapSite) -> None:
        held = await site.hold()
        waiting = site.post()
        await site.until(lambda: site.service.batcher.waiting == 1)
        swapping = site.swap("/bundles/8")
        await site.until(lambda: site.service.served.manifest.model.version == "8")
        assert await site.version() == "8"
        assert (await site.state())["swaps"][0]["state"] == "retiring"
        assert not site.first.closed
        assert "ddetr_queue_depth 1.0" in await site.metrics(), "what waits for the old engine counts, too"
        site.first.gate.set()
        assert [(await task).json()["model"]["version"] for task in (held, waiting)] == [FIRST, FIRST]
        answer = await swapping
        assert (answer.status_code, answer.json()["state"], answer.json()["reason"]) == (200, "promoted", None)
        assert site.first.closed
        assert await site.version() == "8"
        text = await site.metrics()
        assert 'ddetr_bundle_swaps_total{outcome="promoted"} 1.0' in text
        assert 'version="8"} 1.0' in text
        assert 'version="7"' not in text

    run(test)


def test_a_request_whose_body_is_on_its_way_keeps_its_bundle() -> None:
    async def test(site: SwapSite) -> None:
        sender = Sender(site)
        picture = encode(rectangle(RED))
        sender.send(picture[:100])
        await site.until(lambda: site.service.admission.waiting == 1)
        batches = len(site.first.batches)
        swapping = site.swap("/bundles/8")
        await site.until(lambda: site.service.served.manifest.model.version == "8")
        sender.send(picture[100:], last=True)
        await sender.task
        assert sender.status == 200
        assert len(site.first.batches) == batches + 1
        assert (await swapping).status_code == 200

    run(test)


def test_a_bundle_of_other_canvases_and_classes() -> None:
    async def test(site: SwapSite) -> None:
        rule = ResizeRule(shortest=32, longest=48)
        names = {"categories": {1: "rouge", 2: "vert", 5: "bleu"}, "resize": rule, "canvases": canvases_for(rule)}
        site.bundles.manifests["8"] = MANIFEST.model_copy(update=names)
        held = await site.hold()
        swapping = site.swap("/bundles/8")
        await site.until(lambda: site.service.served.manifest.model.version == "8")
        refused = await site.client.post("/detect?classes=red", content=encode(rectangle(RED)), headers=PNG)
        assert refused.status_code == 400
        answer = await site.client.post("/detect?classes=rouge", content=encode(rectangle(RED)), headers=PNG)
        assert answer.json()["images"][0]["detections"][0]["label"] == "rouge"
        site.first.gate.set()
        assert (await held).json()["images"][0]["detections"][0]["label"] == "red"
        await swapping
        assert (await site.client.get("/model")).json()["categories"]["1"] == "rouge"

    run(test)


@pytest.mark.parametrize(
    "error",
    [
        HashMismatch("model.onnx: SHA-256 is 1, manifest.json says 2"),
        ParityFailed("canvas 64x64: boxes"),
        OSError("no"),
    ],
)
def test_what_cannot_be_opened_is_not_promoted_and_says_why(error: Exception) -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.errors["8"] = error
        answer = await site.swap("/bundles/8")
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bundle_not_promoted")
        assert str(error) in answer.json()["error"]["message"]
        (swap,) = (await site.state())["swaps"]
        assert (swap["state"], swap["model"]) == ("rejected", None)
        assert str(error) in swap["reason"]
        assert await site.version() == FIRST
        assert 'ddetr_bundle_swaps_total{outcome="rejected"} 1.0' in await site.metrics()
        assert (await site.swap("/bundles/9")).status_code == 200

    run(test)


@pytest.mark.parametrize("trouble", ["raise", "nan", "shape", "exit"])
def test_an_engine_that_fails_when_it_is_warmed_is_not_promoted(trouble: str) -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.on_open["8"] = lambda engine: setattr(engine, "trouble", trouble)
        answer = await site.swap("/bundles/8")
        assert answer.status_code == 422
        assert "its engine fails" in answer.json()["error"]["message"]
        assert await site.version() == FIRST
        await site.until(lambda: site.bundles.opened["8"].closed)

    run(test)


def test_a_swap_does_not_fall_back_unless_what_is_in_service_has() -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.passed_over = ("tensorrt: canvas 64x64: boxes",)
        answer = await site.swap("/bundles/8")
        assert "tensorrt: canvas 64x64: boxes" in answer.json()["error"]["message"]
        assert site.bundles.opened["8"].closed
        site.service.served.opened.verdicts = (
            await asyncio.to_thread(site.bundles, site.service.settings, Path("/x"), site.service.metrics, 0.0, bool)
        ).verdicts
        assert (await site.swap("/bundles/9")).status_code == 200

    run(test)


NO_ENGINE = "tensorrt: the bundle has no engine (ddetr build adds one)"


@pytest.mark.parametrize(
    ("served", "status"),
    [
        (Verdict("tensorrt 10.14 on cuda:0", "passed"), 422),
        (Verdict("tensorrt 10.14 on cuda:0", "passed", unavailable=("tensorrt a.engine: too small",)), 422),
        (Verdict("onnxruntime on cpu", "passed", unavailable=("tensorrt: no GPU",)), 200),
    ],
)
def test_a_swap_takes_no_slower_kind_because_the_better_one_does_not_open(served: Verdict, status: int) -> None:
    async def test(site: SwapSite) -> None:
        site.service.served.opened.verdicts = (served,)
        site.bundles.engine, site.bundles.unavailable = "onnxruntime on cpu", (NO_ENGINE,)
        answer = await site.swap("/bundles/8")
        assert answer.status_code == status
        assert await site.version() == (FIRST if status == 422 else "8")
        if status == 422:
            assert f"{NO_ENGINE}; onnxruntime on cpu could stand in" in answer.json()["error"]["message"]

    run(test)


def test_an_engine_that_will_be_built_is_not_missed() -> None:
    async def test(site: SwapSite) -> None:
        site.service.served.opened.verdicts = (Verdict("tensorrt 10.14 on cuda:0", "passed"),)
        site.bundles.engine, site.bundles.unavailable = "onnxruntime on cpu", (NO_ENGINE,)
        assert (await site.swap("/bundles/8")).status_code == 200

    run(test, build_engine="background")


def test_a_bundle_without_a_proof_takes_no_proven_ones_place() -> None:
    async def test(site: SwapSite) -> None:
        assert (await site.swap("/bundles/8")).status_code == 200
        site.bundles.result = "no proof"
        refused = await site.swap("/bundles/9")
        assert refused.status_code == 422
        assert "/bundles/9 carries no proof" in refused.json()["error"]["message"]
        assert "--no-gate" in refused.json()["error"]["message"]
        assert await site.version() == "8"
        site.service.served.opened.verdicts = (Verdict("fake", "no proof"),)
        assert (await site.swap("/bundles/9")).status_code == 200

    run(test)


def test_the_api_is_described_with_the_version_and_the_classes_in_service() -> None:
    async def test(site: SwapSite) -> None:
        async def described() -> tuple[str, list[str]]:
            schema = (await site.client.get("/openapi.json")).json()
            parameters = {each["name"]: each["schema"] for each in schema["paths"]["/detect"]["post"]["parameters"]}
            return schema["info"]["version"], parameters["classes"]["examples"]

        assert await described() == (FIRST, ["red,green"])
        site.bundles.manifests["8"] = MANIFEST.model_copy(update={"categories": {1: "rouge", 2: "vert", 5: "bleu"}})
        assert (await site.swap("/bundles/8")).status_code == 200
        assert await described() == ("8", ["rouge,vert"])

    run(test)


def test_one_at_a_time() -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.gate.clear()
        swapping = site.swap("/bundles/8")
        await asyncio.to_thread(site.bundles.entered.acquire)
        refused = await site.begin("/bundles/9")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "swap_in_progress")
        assert "swap 1 to /bundles/8 is opening" in refused.json()["error"]["message"]
        assert await site.version() == FIRST
        site.bundles.gate.set()
        assert (await swapping).status_code == 200
        begun = await site.begin("/bundles/9")
        assert (begun.status_code, begun.json()["state"]) == (202, "opening")
        assert begun.headers["location"] == "/admin/bundle"
        await site.until(lambda: not site.swaps.busy)
        state = await site.state()
        assert [(swap["id"], swap["state"]) for swap in state["swaps"]] == [("2", "promoted"), ("1", "promoted")]
        assert state["in_service"]["path"] == "/bundles/9"
        assert state["in_service"]["gate"][0]["result"] == "passed"

    run(test)


def test_the_same_bundle_again_is_opened_anew() -> None:
    async def test(site: SwapSite) -> None:
        for _ in range(3):
            assert (await site.swap("/bundles/8")).status_code == 200
        assert site.bundles.count == 3
        assert await site.version() == "8"

    run(test)


def test_an_opening_that_hangs_is_given_up_and_closed_when_it_ends() -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.gate.clear()
        answer = await site.swap("/bundles/8")
        assert "opening it takes longer than 0.2 s" in answer.json()["error"]["message"]
        assert await site.version() == FIRST
        site.bundles.gate.set()
        await site.until(lambda: "8" in site.bundles.opened and site.bundles.opened["8"].closed)
        assert await site.version() == FIRST

    run(test, swap_timeout_seconds=0.2)


def test_after_three_openings_that_hang_there_is_no_fourth() -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.gate.clear()
        for _ in range(3):
            assert (await site.swap("/bundles/8")).status_code == 422
        refused = await site.swap("/bundles/8")
        assert refused.status_code == 422
        assert "3 openings or engines hang" in refused.json()["error"]["message"]
        site.bundles.gate.set()
        await site.until(lambda: not any(not each.done() for each in site.swaps._promotion._hanging))
        assert (await site.begin("/bundles/8")).status_code == 202

    run(test, swap_timeout_seconds=0.1)


def test_an_engine_that_hangs_when_it_is_warmed_is_given_up() -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.on_open["8"] = lambda engine: engine.gate.clear()
        answer = await site.swap("/bundles/8")
        assert "warming it takes longer than 1 s" in answer.json()["error"]["message"]
        assert await site.version() == FIRST
        site.bundles.opened["8"].gate.set()
        await site.until(lambda: site.bundles.opened["8"].closed)

    run(test, swap_timeout_seconds=1)


def test_engines_that_hang_when_they_are_warmed_are_counted_too() -> None:
    async def test(site: SwapSite) -> None:
        for version in ("8", "9", "10"):
            site.bundles.on_open[version] = lambda engine: engine.gate.clear()
            assert "warming it takes longer" in (await site.swap(f"/bundles/{version}")).json()["error"]["message"]
        assert "3 openings or engines hang" in (await site.swap("/bundles/11")).json()["error"]["message"]
        assert "11" not in site.bundles.opened
        site.bundles.release()
        await site.until(lambda: all(site.bundles.opened[version].closed for version in ("8", "9", "10")))
        assert (await site.begin("/bundles/11")).status_code == 202
        await site.until(lambda: not site.swaps.busy)
        assert "11" in site.bundles.opened

    run(test, swap_timeout_seconds=0.5)


def test_a_server_that_drains_swaps_no_more() -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.gate.clear()
        swapping = site.swap("/bundles/8")
        await asyncio.to_thread(site.bundles.entered.acquire)
        held = await site.hold()
        site.service.drain()
        answer = await swapping
        assert "the server is stopping" in answer.json()["error"]["message"]
        refused = await site.begin("/bundles/9")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        site.swaps.reload("signal")
        site.first.gate.set()
        assert (await held).json()["model"]["version"] == FIRST
        await site.until(lambda: not site.swaps.busy)
        assert len(site.swaps.history) == 1

    run(test)


def test_a_server_that_stops_in_a_swap_lets_everything_go() -> None:
    gone = threading.Semaphore(0)

    def tell(engine: FakeEngine) -> None:
        engine.close = gone.release  # type: ignore[method-assign]

    async def test(site: SwapSite) -> None:
        site.bundles.on_open["8"] = tell
        tell(site.first)
        await site.begin("/bundles/8")
        await site.until(lambda: site.service.served.manifest.model.version == "8")
        assert site.swaps.history[-1].state == "watched"

    run(test, rollback_seconds=3600)
    assert all(gone.acquire(timeout=20) for _ in range(2))


def test_a_client_that_does_not_wait_for_the_end_ends_nothing() -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.gate.clear()
        swapping = site.swap("/bundles/8")
        await asyncio.to_thread(site.bundles.entered.acquire)
        swapping.cancel()
        await asyncio.wait([swapping])
        site.bundles.gate.set()
        await site.until(lambda: not site.swaps.busy)
        assert [outcome(swap) for swap in site.swaps.history] == [("/bundles/8", "promoted")]

    run(test)


def test_an_engine_that_dies_after_the_switch_brings_the_old_bundle_back() -> None:
    async def test(site: SwapSite) -> None:
        swapping = site.swap("/bundles/8")
        await site.until(lambda: site.service.served.manifest.model.version == "8")
        assert await site.version() == "8"
        site.bundles.opened["8"].trouble = "raise"
        asking = site.post()
        answer = await swapping
        assert answer.status_code == 422
        assert "rolled_back: its engine died or hung" in answer.json()["error"]["message"]
        assert await site.version() == FIRST
        assert (await asking).status_code == 200, "by the engine that took its place"
        assert not site.first.closed
        assert 'ddetr_bundle_swaps_total{outcome="rolled_back"} 1.0' in await site.metrics()
        assert (await site.client.get("/readyz")).status_code == 200

    run(test, rollback_seconds=3600)


def test_requests_do_not_wait_for_an_engine_that_does_not_come_back_when_another_bundle_serves() -> None:
    async def test(site: SwapSite) -> None:
        swapping = site.swap("/bundles/8")
        await site.until(lambda: site.service.served.manifest.model.version == "8")
        engine = site.bundles.opened["8"]
        engine.gate.clear()
        site.bundles.on_open["8"] = lambda engine: setattr(engine, "trouble", "raise")
        asking = [site.post() for _ in range(6)]
        await site.until(lambda: site.service.batcher.waiting == 5)  # one is with the engine
        engine.trouble = "raise"
        engine.gate.set()
        async with asyncio.timeout(8):  # their deadline is in 30 s
            answers = [await each for each in asking]
        assert sorted(answer.status_code for answer in answers) == [500, 503, 503, 503, 503, 503]
        assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 503)
        assert (await swapping).status_code == 422
        assert await site.version() == FIRST

    run(test, rollback_seconds=3600, max_batch_size=1)


def test_a_bundle_whose_engine_died_and_does_not_come_back_is_let_go_at_once() -> None:
    async def test(site: SwapSite) -> None:
        swapping = site.swap("/bundles/8")
        await site.until(lambda: site.service.served.manifest.model.version == "8")
        new = site.service.served
        site.bundles.opened["8"].trouble = "raise"
        site.bundles.on_open["8"] = lambda engine: setattr(engine, "trouble", "raise")
        asking = site.post()
        async with asyncio.timeout(8):  # the patience with engines that are slow to go is 10 s
            assert (await swapping).status_code == 422
        assert (await asking).status_code == 500
        assert new.batcher._closed
        assert await site.version() == FIRST

    run(test, rollback_seconds=3600)


def test_images_that_the_new_engine_fails_on_bring_the_old_bundle_back() -> None:
    async def test(site: SwapSite) -> None:
        swapping = site.swap("/bundles/8")
        await site.until(lambda: site.service.served.manifest.model.version == "8")
        assert [(await site.post(poison())).status_code for _ in range(3)] == [500] * 3
        answer = await swapping
        assert "its engine failed on 3 of 3 images" in answer.json()["error"]["message"]
        assert await site.version() == FIRST
        assert site.bundles.opened["8"].closed

    run(test, rollback_seconds=3600)


def test_few_failures_among_many_answers_are_no_reason() -> None:
    async def test(site: SwapSite) -> None:
        await site.begin("/bundles/8")
        await site.until(lambda: site.service.served.manifest.model.version == "8")
        for _ in range(20):
            assert await site.version() == "8"
        for _ in range(3):
            await site.post(poison())
        served = site.service.served
        assert (served.answered, served.failed) == (20, 3)
        assert served.suspicion() is None

    run(test, rollback_seconds=3600, rollback_error_percent=20)


def test_predictions_begin_with_what_the_new_engine_was_measured_at() -> None:
    async def test(site: SwapSite) -> None:
        await site.version()
        old = site.service.served.estimate
        await site.swap("/bundles/8")
        new = site.service.served.estimate
        assert new is not old
        assert new.decode_s == old.decode_s
        assert new.mix() == old.mix()
        assert all(new.batch_s(canvas, 1) is not None for canvas in MANIFEST.canvases)
        assert site.service.admission._estimate is new

    run(test)


def test_an_engine_lost_after_a_swap_is_opened_from_the_bundle_that_it_served() -> None:
    async def test(site: SwapSite) -> None:
        await site.swap("/bundles/8")
        site.bundles.opened["8"].trouble = "raise"
        assert await site.version() == "8"
        assert site.bundles.count == 2

    run(test)


# Ended by an administrator


async def end(site: SwapSite, *, wait: bool = False) -> httpx2.Response:
    return await site.client.delete(f"/admin/bundle{'?wait=true' if wait else ''}", headers=KEY)


def test_an_opening_is_ended_and_told_to_end_early() -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.gate.clear()
        swapping = site.swap("/bundles/8")
        await asyncio.to_thread(site.bundles.entered.acquire)
        assert not site.bundles.given_up()
        ended = await end(site)
        assert (ended.status_code, ended.json()["state"]) == (202, "opening")
        answer = await swapping
        assert "swap 1: rejected: an administrator ended it" in answer.json()["error"]["message"]
        assert site.bundles.given_up()
        site.bundles.gate.set()
        await site.until(lambda: "8" in site.bundles.opened and site.bundles.opened["8"].closed)
        assert (await site.swap("/bundles/9")).status_code == 200
        assert not site.bundles.given_up()

    run(test)


def test_an_opening_that_took_too_long_or_that_the_server_stops_in_is_told_so() -> None:
    async def test(site: SwapSite) -> None:
        site.bundles.gate.clear()
        await site.swap("/bundles/8")
        assert site.bundles.given_up()
        swapping = site.swap("/bundles/9")
        await site.until(lambda: not site.bundles.given_up())
        site.service.drain()
        assert site.bundles.given_up()
        await swapping

    run(test, swap_timeout_seconds=0.2)


def test_while_the_old_bundle_is_ready_it_is_back() -> None:
    async def test(site: SwapSite) -> None:
        swapping = site.swap("/bundles/8")
        await site.until(lambda: site.service.served.manifest.model.version == "8")
        ended = await end(site, wait=True)
        assert (ended.status_code, ended.json()["state"]) == (200, "rolled_back")
        assert ended.json()["reason"] == "an administrator ended it"
        assert (await swapping).status_code == 422
        assert await site.version() == FIRST
        assert site.bundles.opened["8"].closed
        assert not site.first.closed

    run(test, rollback_seconds=3600)


def test_where_there_is_nothing_to_end_it_is_409() -> None:
    async def test(site: SwapSite) -> None:
        none = await end(site)
        assert (none.status_code, none.json()["error"]["code"]) == (409, "no_swap")
        held = await site.hold()
        swapping = site.swap("/bundles/8")
        await site.until(lambda: bool(site.swaps.history) and site.swaps.history[-1].state == "retiring")
        late = await end(site)
        assert (late.status_code, late.json()["error"]["code"]) == (409, "no_swap")
        assert "swap 1 to /bundles/8 is over but for letting a bundle go" in late.json()["error"]["message"]
        site.first.gate.set()
        assert (await held).status_code == (await swapping).status_code == 200
        assert (await end(site)).status_code == 409

    run(test)


# What the settings' bundle leads to


class Link:
    """A link that the settings name, and folders that it may lead to."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "current"
        self.folder = folder
        for version in ("8", "9"):
            write_tiny_bundle(folder / version, version)

    def point(self, version: str) -> None:
        fresh = self.folder / "fresh"
        fresh.symlink_to(self.folder / version)
        fresh.replace(self.path)


@pytest.fixture
def link(tmp_path: Path) -> Link:
    link = Link(tmp_path)
    link.point("8")
    return link


def manifests(site: SwapSite, link: Link) -> None:
    """Let the fakes have the manifests of the folders."""
    from bundle import read_bundle

    for version in ("8", "9"):
        site.bundles.manifests[version] = read_bundle(link.folder / version).manifest


def test_a_reload_follows_the_link_and_does_nothing_twice(link: Link) -> None:
    async def test(site: SwapSite) -> None:
        manifests(site, link)
        for version in ("8", "8", "9", "9", "8"):
            link.point(version)
            site.swaps.reload("signal")
            await site.until(lambda: not site.swaps.busy)
            assert await site.version() == version
        assert [swap.path.rsplit("/")[-1] for swap in site.swaps.history] == ["8", "9", "8"]
        assert {swap.cause for swap in site.swaps.history} == {"signal"}

    run(test, bundle=link.path)


def test_a_storm_of_reloads_is_one_or_two_swaps(link: Link) -> None:
    async def test(site: SwapSite) -> None:
        manifests(site, link)
        site.bundles.gate.clear()
        for _ in range(1000):
            site.swaps.reload("signal")
        await asyncio.to_thread(site.bundles.entered.acquire)
        link.point("9")
        for _ in range(1000):
            site.swaps.reload("signal")
        refused = await site.begin("/bundles/8")
        assert refused.status_code == 409
        site.bundles.gate.set()
        await site.until(lambda: not site.swaps.busy)
        assert [swap.path.rsplit("/")[-1] for swap in site.swaps.history] == ["8", "9"]
        assert await site.version() == "9"

    run(test, bundle=link.path)


def test_a_reload_of_something_bad_changes_nothing(link: Link) -> None:
    async def test(site: SwapSite) -> None:
        link.path.unlink()
        site.swaps.reload("signal")
        await site.until(lambda: not site.swaps.busy)
        assert site.swaps.history[-1].state == "promoted", "the fakes open anything"
        site.bundles.errors["current"] = OSError("gone")
        site.swaps.reload("signal")
        await site.until(lambda: not site.swaps.busy)
        assert site.swaps.history[-1].state == "rejected"
        assert await site.version() == "current"

    run(test, bundle=link.path)


def test_a_watched_bundle_is_swapped_to_once_it_is_still(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.swap._WATCH_S", 0.01)

    async def test(site: SwapSite) -> None:
        manifests(site, link)
        await site.until(lambda: site.service.served.manifest.model.version == "8")
        await site.until(lambda: not site.swaps.busy)
        link.point("9")
        await site.until(lambda: site.service.served.manifest.model.version == "9")
        await site.until(lambda: not site.swaps.busy)
        assert [swap.cause for swap in site.swaps.history] == ["watch", "watch"]
        site.bundles.errors["8"] = OSError("half of it")
        link.point("8")
        await site.until(lambda: len(site.swaps.history) == 3 and not site.swaps.busy)
        assert site.swaps.history[-1].state == "rejected"
        for _ in range(10):  # and it is not tried again and again
            await asyncio.sleep(0.01)
        assert len(site.swaps.history) == 3
        del site.bundles.errors["8"]
        (link.folder / "8" / "model.onnx").touch()
        await site.until(lambda: len(site.swaps.history) == 4 and not site.swaps.busy)
        assert await site.version() == "8"

    run(test, bundle=link.path, watch_bundle=True)
