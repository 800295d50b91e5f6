"""/metrics on a port of its own, for a network that the public does not reach."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.types import ASGIApp

from server.bind import bind
from server.connection import Connection

logger = logging.getLogger("ddetr.run")


@contextlib.asynccontextmanager
async def listening(app: ASGIApp, host: str, port: int) -> AsyncIterator[int]:
    """Serve `app` at host:port (0: any free port) while inside; gives the port. Raises StartupError if it is taken."""
    listener = bind(host, port, "metrics_port")
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
