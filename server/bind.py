"""Takes an address before anything is loaded, so that one in use is told at once."""

import socket

from server.errors import StartupError


def bind(host: str, port: int, setting: str) -> socket.socket:
    """A socket at host:port (0: any free port), not listening yet: who connects now is refused, and does not wait.

    Raises StartupError, naming the setting, where the address is taken or none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartupError(f"{setting}: {host}:{port} is no address: {error.strerror or error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise StartupError(f"{setting}: cannot listen on {host}:{port}: {error.strerror or error}") from error
    return bound
