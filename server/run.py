"""Serves the application until it is told to stop: `ddetr serve`."""

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import time
from types import FrameType

import uvicorn

from server import open_files
from server.app import create_app
from server.bind import bind
from server.connection import Connection
from server.decode import drop_kept_memory
from server.engine import Engine, OpenEngine
from server.errors import StartupError
from server.logs import close_log, open_log
from server.malloc import give_back_regularly, tame_malloc
from server.service import Service
from server.settings import Settings
from server.swap import Swaps
from server.worker import still_at_work

logger = logging.getLogger("ddetr.run")

_LAST_WAIT_S = 2.0  # for engines to be closed

_YOUNG_OBJECTS = 5000
"""Between two looks for garbage: some ten requests' worth. Python's 700 is less than two's."""


def serve(settings: Settings, engine: Engine | OpenEngine | None = None) -> int:
    """Serve the settings' bundle (or `engine`) until SIGTERM or SIGINT, and finish what was admitted.

    Returns the exit status: 0, or 1 if it cannot start. If a thread is still inside of an engine by then (one that
    hangs, or a bundle that was just being opened), the process ends here: an orderly end would take the engine's memory
    away from under it, and crash.
    """
    tame_malloc()
    open_files.allow_most()
    log = open_log(settings.log_level, settings.log_format)
    try:
        status = _serve(settings, engine)
        if busy := still_at_work(_LAST_WAIT_S):
            logger.warning("not waited for: %s", ", ".join(busy))
    finally:
        close_log(log)
    if busy:
        os._exit(status)
    return status


def _serve(settings: Settings, engine: Engine | OpenEngine | None) -> int:
    try:
        listener = bind(settings.host, settings.port, "port")
        if settings.metrics_port:  # bound for good when it is time; one in use is told now
            bind(settings.metrics_host, settings.metrics_port, "metrics_port").close()
        app = create_app(settings, engine)
    except StartupError as error:
        logger.error("cannot start: %s", error)
        return 1
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,  # see observe.py
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout_ms / 1e3),
    )
    server = _DrainingServer(config, app.state.service, app.state.swaps)
    # uvicorn raises the signal once more when it is done, for the handler that was there before: this one, so that a
    # stop that was asked for ends with 0.
    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signal_number, lambda *_: None)
    server.run(sockets=[listener])
    return 0 if server.started else 1


class _DrainingServer(uvicorn.Server):
    """Closes the door at the signal, not only when the last connection has ended. SIGHUP: looks for a new bundle."""

    def __init__(self, config: uvicorn.Config, service: Service, swaps: Swaps) -> None:
        super().__init__(config)
        self._service = service
        self._swaps = swaps
        self._on_terminal = os.isatty(0)
        self._giving_back: asyncio.Task[None] | None = None
        self._closes_s = math.inf

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """What is there when the first request comes stays: the collector need not look at it again and again.

        It would, each time for some 50 ms in which everyone waits, and for an eighth of a request's CPU time.
        """
        await super().startup(sockets)
        gc.collect()
        gc.freeze()
        gc.set_threshold(_YOUNG_OBJECTS)
        self._giving_back = asyncio.create_task(give_back_regularly(drop_kept_memory))
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hang_up)
        if self.started:
            for listener in sockets or ():
                host, port = listener.getsockname()[:2]
                logger.info("running on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does it, and nothing is left running beside it."""
        if self._giving_back is not None:
            self._giving_back.cancel()
        await super().shutdown(sockets)

    def _hang_up(self) -> None:
        if self._on_terminal and not os.isatty(0):  # its window was closed: nobody is there to stop it later
            self.handle_exit(signal.SIGTERM, None)
        else:
            self._swaps.reload("signal")

    async def on_tick(self, counter: int) -> bool:
        """Some ten times a second; whether to stop."""
        if time.monotonic() >= self._closes_s:
            self._closes_s = math.inf
            self._close(signal.SIGTERM, None)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """At once, or at SIGTERM after the delay that is set; a second signal ends the delay."""
        delay_s = self._service.settings.shutdown_delay_ms / 1e3
        if sig != signal.SIGTERM or not delay_s or self._service.leaving:
            self._closes_s = math.inf
            self._close(sig, frame)
            return
        logger.info("SIGTERM: requests are taken for %g s more", delay_s)
        self._closes_s = time.monotonic() + delay_s
        self._service.leaving = True
        # Whoever keeps a connection is told to open the next one, and that one leads elsewhere.
        self.config.encoded_headers = [*self.config.encoded_headers, (b"connection", b"close")]
        self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]

    def _close(self, sig: int, frame: FrameType | None) -> None:
        logger.info("%s: finishing %d images", signal.Signals(sig).name, self._service.admission.unanswered)
        self._service.drain()
        super().handle_exit(sig, frame)
