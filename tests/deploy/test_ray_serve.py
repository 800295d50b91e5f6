"""The Serve application on a real Ray with two replicas, one of which is killed under load."""

from __future__ import annotations

import asyncio
import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray", reason="ray is not installed: make ray")
with warnings.catch_warnings():  # Ray's own models use what pydantic wants to drop
    warnings.simplefilter("ignore")
    from ray.serve.schema import ServeDeploySchema

import aiohttp
from pydantic import ValidationError
from starlette.testclient import TestClient

from benchmarks.ray_serving import RayServing, configuration, ray_serving
from bundle import Bundle
from deploy.ray.application import NAME, build, replica_settings
from loadtest.server_process import free_port
from server.app import create_app
from server.settings import Settings
from tests.deploy.processes import ROOT, descendants, wait_for
from tests.server.pictures import encode, rectangle
from tests.server.tiny_bundle import write_tiny_bundle

CONFIGURATIONS = sorted((ROOT / "deploy" / "ray").glob("*.yaml"))
START_S = 300.0
REQUESTS, CLIENTS, MOST_TRIES = 400, 8, 20

OF_THE_WAY = {"date", "server", "server-timing", "x-request-id", "content-length", "transfer-encoding", "connection"}
"""Of this process and this connection: an HAProxy that hears of a new replica closes those that it has."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module", params=[False, True], ids=["own-proxy", "haproxy"])
def serving(bundle: Bundle, request: pytest.FixtureRequest) -> Iterator[RayServing]:
    settings = {"bundle": str(bundle.path), "engine_threads": 1}
    content = configuration(free_port(), settings, replicas=2, cpus=0.5)
    with ray_serving(content, cpus=2, through_haproxy=request.param) as running:
        wait_for(lambda: len(replicas(running)) == 2, START_S, "two replicas")
        yield running


def replicas(serving: RayServing) -> list[int]:
    below = descendants(serving.pids[0])
    return [pid for pid, name in below.items() if name.startswith(f"ray::ServeReplica:ddetr:{NAME}")]


def picture(number: int) -> bytes:
    return encode(rectangle(box=(4 + number % 20, 8, 60, 32)))


@pytest.mark.timeout(2 * START_S)
@pytest.mark.parametrize(
    ("query", "body", "headers"),
    [
        ("", picture(0), {"Content-Type": "image/png"}),
        ("?threshold=0.1&format=coco", picture(1), {"Content-Type": "image/png"}),
        ("?format=image", picture(2), {"Content-Type": "image/png"}),
        ("?threshold=2", picture(3), {"Content-Type": "image/png"}),
        ("", b"no picture", {"Content-Type": "image/png"}),
        ("", b"{}", {"Content-Type": "application/json"}),
        ("", b"a=1", {"Content-Type": "text/plain"}),
    ],
)
def test_a_request_is_answered_as_by_the_server_itself(
    serving: RayServing, bundle: Bundle, query: str, body: bytes, headers: dict[str, str]
) -> None:
    async def ask() -> tuple[int, list[tuple[str, str]], bytes]:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{serving.url}/detect{query}", data=body, headers={**headers, "X-Request-ID": "mine"}) as got,
        ):
            return got.status, [(name.lower(), value) for name, value in got.headers.items()], await got.read()

    status, found, content = asyncio.run(ask())
    with TestClient(create_app(Settings(bundle=bundle.path, device="cpu", engine_threads=1))) as client:
        expected = client.post(f"/detect{query}", content=body, headers={**headers, "X-Request-ID": "mine"})
    assert (status, content) == (expected.status_code, expected.content)
    names = Counter(name for name, _ in found)
    assert names["x-request-id"] == 1
    assert ("x-request-id", "mine") in found
    assert {name: value for name, value in found if name not in OF_THE_WAY} == {
        name: value for name, value in expected.headers.items() if name not in OF_THE_WAY
    }


@pytest.mark.timeout(3 * START_S)
def test_a_killed_replica_costs_tries_but_no_answers(serving: RayServing) -> None:
    """Every client asks again after anything but 200, as clients do; each gets the answer to its own picture."""
    before = replicas(serving)
    answers: dict[int, list[float]] = {}
    tries: Counter[int] = Counter()
    outcomes: Counter[str] = Counter()

    async def ask(session: aiohttp.ClientSession, number: int) -> None:
        for attempt in range(1, MOST_TRIES + 1):
            try:
                async with session.post(
                    f"{serving.url}/detect", data=picture(number), headers={"Content-Type": "image/png"}
                ) as response:
                    outcomes[str(response.status)] += 1
                    if response.status == 200:
                        content = await response.json()
                        assert number not in answers
                        answers[number] = content["images"][0]["detections"][0]["box"]
                        tries[attempt] += 1
                        return
            except aiohttp.ClientError as error:
                outcomes[type(error).__name__] += 1
            await asyncio.sleep(0.2)

    async def load() -> None:
        waiting = iter(range(REQUESTS))

        async def client(session: aiohttp.ClientSession) -> None:
            for number in waiting:
                if number == REQUESTS // 4:
                    os.kill(before[0], signal.SIGKILL)
                await ask(session, number)

        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(client(session) for _ in range(CLIENTS)))

    asyncio.run(load())
    assert sorted(answers) == list(range(REQUESTS)), f"lost, after {dict(outcomes)}"
    assert all(box[0] == pytest.approx(4 + number % 20, abs=0.01) for number, box in answers.items())
    assert REQUESTS - tries[1] <= 3 * CLIENTS, f"more than what was inside when it was killed: {dict(outcomes)}"
    wait_for(lambda: len(set(replicas(serving)) - set(before)) == 1, START_S, "a replica in its place")


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.name)
def test_configurations_are_rays_own_and_name_real_settings(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    schema = ServeDeploySchema.model_validate(content)
    (application,) = schema.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    assert [deployment.name for deployment in application.deployments] == [NAME]
    settings = Settings(**application.args)
    assert schema.http_options.host == "127.0.0.1", "open to all only where somebody says so"
    options = content["applications"][0]["deployments"][0]
    assert options["autoscaling_config"]["target_ongoing_requests"] == 2 * settings.max_batch_size
    assert (
        options["autoscaling_config"]["target_ongoing_requests"]
        < build(application.args)._bound_deployment.max_ongoing_requests
    )


def test_there_are_configurations() -> None:
    assert [path.name for path in CONFIGURATIONS] == ["cpu.yaml", "gpu.yaml"]
    gpu = yaml.safe_load((ROOT / "deploy" / "ray" / "gpu.yaml").read_text(encoding="utf-8"))
    assert gpu["applications"][0]["deployments"][0]["ray_actor_options"]["num_gpus"] == 1


def test_settings_that_cannot_be_are_refused_before_any_replica_starts() -> None:
    with pytest.raises(ValidationError, match="max_batch"):
        build({"max_batch_size": 0})
    with pytest.raises(ValidationError, match="max_batch_sise"):
        build({"max_batch_sise": 4})


def test_serve_gives_a_replica_the_time_to_drain() -> None:
    options = build({"drain_timeout_ms": 45_000})._bound_deployment
    assert options._deployment_config.graceful_shutdown_timeout_s > 45


def test_a_replica_takes_the_threads_it_was_given_and_no_more() -> None:
    settings = replica_settings({"engine_instances": 2}, 4.0, [])
    assert (settings.engine_threads, settings.decode_threads) == (2, 4)
    settings = replica_settings({"engine_threads": 3, "decode_threads": 1}, 0.5, [])
    assert (settings.engine_threads, settings.decode_threads) == (3, 1)


def test_replicas_on_one_hosts_gpus_have_metrics_ports_of_their_own() -> None:
    assert replica_settings({"metrics_port": 9090}, 1.0, [3]).metrics_port == 9093
    assert replica_settings({"metrics_port": 9090}, 1.0, []).metrics_port == 9090
    assert replica_settings({}, 1.0, [3]).metrics_port == 0
