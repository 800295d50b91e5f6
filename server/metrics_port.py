"""/metrics on a port of its own, for a network that the public does not reach."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.types import ASGIApp

from server.connection import Connection
from server.errors import StartupError

logger = logging.getLogger("ddetr.run")


@contextlib.asynccontextmanager
async def listening(app: ASGIApp, host: str, port: int) -> AsyncIterator[int]:
    """Serve `app` at host:port (0: any free port) while inside; gives the port. Raises StartupError if it is taken."""
    listener = _listen(host, port)
    port = listener.getsockname()[1]
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,  # a scrape takes no longer, and there will be none to follow
    )
    server = _Listener(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    logger.info("metrics on http://%s:%d/metrics", f"[{host}]" if ":" in host else host, port)
    try:
        yield port
    finally:
        server.should_exit = True
        await serving
        listener.close()


class _Listener(uvicorn.Server):
    """Leaves the process's signals to the server beside which it runs."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise StartupError(f"metrics_port: cannot listen on {host}:{port}: {error.strerror or error}") from error
