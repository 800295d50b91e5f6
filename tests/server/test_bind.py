import socket

import pytest

from server.bind import bind
from server.errors import StartupError


def test_takes_a_free_port_and_does_not_listen_yet() -> None:
    with bind("127.0.0.1", 0, "port") as bound:
        host, port = bound.getsockname()
        assert host == "127.0.0.1"
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect((host, port))
        bound.listen()
        with socket.create_connection((host, port)):
            pass


def test_a_port_in_use_is_refused_by_its_number() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StartupError, match=rf"^port: cannot listen on 127\.0\.0\.1:{port}: .*in use"):
            bind("127.0.0.1", port, "port")


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_another_machine_is_refused_by_its_name(host: str) -> None:
    with pytest.raises(StartupError, match=rf"metrics_port: .*{host}"):
        bind(host, 8000, "metrics_port")
