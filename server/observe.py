"""Around every request: its id, its count, its latency, and an answer even to what nobody foresaw."""

import logging
import re
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.metrics import Metrics

logger = logging.getLogger("ddetr.http")

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_CLIENT_GONE = 499
_MEASURED_ROUTE = "/detect"


class Observe:
    """ASGI middleware. Puts `request_id` and `arrived_s` (by `clock`) into the request's state."""

    def __init__(self, app: ASGIApp, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._app = app
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, observed."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived_s = self._clock()
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {}).update(request_id=request_id, arrived_s=arrived_s)
        status = 0

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(raw=message["headers"])["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, observed_send)
        except ClientDisconnect:
            status = _CLIENT_GONE
        except Exception:
            logger.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            if status:  # the answer has begun: only the connection's end can tell of the failure
                raise
            await _send_internal_error(observed_send, request_id)
        finally:
            route = _route(scope)
            self._metrics.requests.labels(route, str(status or _CLIENT_GONE)).inc()
            if route == _MEASURED_ROUTE and status == 200:  # refusals are quick, and would flatter the figure
                self._metrics.request_latency.observe(self._clock() - arrived_s)


def _request_id(headers: Headers) -> str:
    """The caller's, if it can stand in a header and a log line; else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _route(scope: Scope) -> str:
    """The route's path template; all that match none are one, so that nobody can make labels up."""
    route: Any = scope.get("route")
    path = getattr(route, "path", None)
    return path if isinstance(path, str) else "unmatched"


async def _send_internal_error(send: Send, request_id: str) -> None:
    body = b'{"error":{"code":"internal","message":"an error of the server; its log has it under request id %s"}}'
    body %= request_id.replace("\\", "\\\\").replace('"', '\\"').encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})
