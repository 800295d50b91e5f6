"""An application behind a real socket, in a thread of this process."""

import contextlib
import threading
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI


class _Quiet(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # signals are the main thread's
        yield


@contextlib.contextmanager
def live(app: FastAPI) -> Iterator[int]:
    """Serve `app` on a free port of 127.0.0.1; gives the port."""
    ready = threading.Event()

    class Told(_Quiet):
        async def startup(self, sockets: object = None) -> None:
            try:
                await super().startup()
            finally:
                ready.set()

    server = Told(uvicorn.Config(app, port=0, log_config=None, access_log=False, server_header=False, lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(30)
        assert server.started
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
