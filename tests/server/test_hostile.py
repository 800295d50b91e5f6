"""Attacks on a server in a process of its own: each is answered with a reason, at no cost to memory or to others."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.server import hostile
from tests.server.hostile import ATTACKS, MAX_BODY_BYTES, Attack
from tests.server.siege import Siege

MOST_GROWTH_MB = 32
MOST_NEIGHBOUR_MS = 2000  # a busy machine of two cores; measured alone: below 50


@pytest.fixture(scope="module")
def siege() -> Iterator[Siege]:
    with Siege() as siege:
        yield siege


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_is_answered_with_a_reason_and_costs_nothing(siege: Siege, attack: Attack) -> None:
    result = siege.attack(attack)
    assert (result.status, result.code) == (attack.status, attack.code), result
    if attack.code:
        assert result.message
    assert result.growth_mb < MOST_GROWTH_MB, result
    assert result.neighbour_ms < MOST_NEIGHBOUR_MS, result
    assert siege.process.poll() is None


def test_bodies_that_are_declared_and_do_not_come_keep_nobody_out(siege: Siege) -> None:
    with ExitStack() as connections:
        for _ in range(8):  # twice what may be held
            connection = connections.enter_context(socket.create_connection(("127.0.0.1", siege.port)))
            connection.sendall(hostile.head("image/png", headers={"Content-Length": str(MAX_BODY_BYTES)}))
        siege.calm_ms()  # raises for a neighbour that is refused


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", '{{"images": [{{"url": "{url}"}}]}}', 400),
        ("application/json", '{{"images": ["{url}"]}}', 400),
        ("application/json", '{{"url": "{url}"}}', 400),
        ("application/json", '{{"images": [{{"b64": "{url}"}}]}}', 422),
        ("application/json", '{{"images": [{{"b64": "data:image/png,{url}"}}]}}', 422),
        ("image/png", "{url}", 422),
        ("image/svg+xml", "<svg xmlns='http://www.w3.org/2000/svg'><image href='{url}'/></svg>", 415),
        ("multipart/form-data; boundary=frontier", hostile.form(hostile.part(b"{url}")).decode(), 422),
    ],
)
def test_no_url_is_fetched(siege: Siege, content_type: str, body: str, status: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/picture.png"
        attack = Attack("a URL", status, "", lambda: body.format(url=url).encode(), content_type)
        result = siege.attack(attack)
        assert result.status == status, result
        with pytest.raises(BlockingIOError):  # nobody has called
            listener.accept()
