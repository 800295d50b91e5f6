"""The way of the one route that counts, past all that a framework does for any route."""

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ServiceError

Endpoint = Callable[[Request], Awaitable[Response]]


class Shortcut:
    """ASGI middleware: a POST to `path` is answered by `endpoint` itself.

    The application has the same route, for its schema; FastAPI's way to it, layers included, takes a fifth of what a
    request costs the event loop. An error of ours is answered by `explain`; all others go on outwards.
    """

    def __init__(
        self,
        app: ASGIApp,
        path: str,
        endpoint: Endpoint,
        explain: Callable[[Request, ServiceError], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._path = path
        self._endpoint = endpoint
        self._explain = explain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or pass it on."""
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or scope["path"].removeprefix(scope.get("root_path", "")) != self._path
        ):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await self._endpoint(request)
        except ServiceError as error:
            response = await self._explain(request, error)
            error.__traceback__ = None  # its frames hold the error again, and the upload: all of it would wait for gc
        await response(scope, receive, send)
