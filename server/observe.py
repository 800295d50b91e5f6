"""Around every request: its id, its line in the log, its count, its span, and an answer even to what nobody foresaw."""

import logging
import random
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.harden import harden
from server.metrics import Metrics
from server.respond import error_content
from server.timing import STAGES, StageTimes
from server.trace import Tracing

logger = logging.getLogger("ddetr.access")

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_CLIENT_GONE = 499
_MEASURED_ROUTE = "/detect"
_PROBES = frozenset({"/livez", "/readyz", "/metrics"})  # asked every few seconds: a line for each would hide the others
_LONGEST_PATH = 200
_STAGE_FIELDS = [f"{stage}_ms" for stage in STAGES]


class Observe:
    """ASGI middleware. Puts `request_id`, `arrived_s` (by `clock`) and `headers` into the request's state.

    In the state it finds afterwards what the stages knew: `images`, `images_failed`, `priority`, `batch_size`, `times`,
    `error_code`, and as `cause` the exception behind an error of ours. `paths` are the routes; all
    else is one route, `unmatched`.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        clock: Callable[[], float],
        paths: Collection[str],
        tracing: Tracing | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._clock = clock
        self._paths = frozenset(paths)
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, observed."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived_s = self._clock()
        headers = _by_name(scope["headers"])
        request_id = _request_id(headers)
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, arrived_s=arrived_s, headers=headers)
        route = self._known_route(scope)
        span = self._tracing.begin(scope) if self._tracing is not None and route not in _PROBES else None
        status = bytes_in = bytes_out = 0
        answered = False
        failure: BaseException | None = None

        async def observed_receive() -> Message:
            nonlocal bytes_in
            message = await receive()
            bytes_in += len(message.get("body", b""))
            return message

        async def observed_send(message: Message) -> None:
            nonlocal status, bytes_out, answered
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = harden(message.get("headers", ()))
                message["headers"].append((b"x-request-id", request_id.encode()))
                if span is not None:
                    message["headers"].append((b"traceresponse", span.traceparent.encode()))
            else:
                bytes_out += len(message.get("body", b""))
            await send(message)
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)

        if route == _MEASURED_ROUTE:
            self._metrics.in_flight.inc()
        try:
            await self._app(scope, observed_receive, observed_send)
        except ClientDisconnect:
            status = _CLIENT_GONE
        except Exception as error:
            failure = error
            if status and not answered:  # only the connection's end can tell of the failure
                raise
            state["error_code"] = "internal"
            if not status:
                await internal_error(request_id)(scope, receive, observed_send)
        finally:
            status = status or _CLIENT_GONE
            total_s = self._clock() - arrived_s
            route = route or _mounted_route(scope)
            self._metrics.requests.labels(route, str(status)).inc()
            if route == _MEASURED_ROUTE:
                self._metrics.in_flight.dec()
                if status == 200:  # refusals are quick, and would flatter the figure
                    self._metrics.request_latency.observe(total_s)
            failure = failure or state.pop("cause", None)
            level = _level(route, status, failure)
            if span is not None or logger.isEnabledFor(level):
                fields = _fields(scope, route, status, bytes_in, bytes_out)
                fields["total_ms"] = round(total_s * 1e3, 3)
                if (trace_id := span.trace_id if span is not None else _trace_id(headers)) is not None:
                    fields["trace_id"] = trace_id
                if span is not None:
                    span.end(fields, state.get("times"), total_s, failure)
                if logger.isEnabledFor(level):
                    # Without looking for the line of code it comes from, which is always this one.
                    message, words = "%s %s %d", (scope["method"], route, status)
                    trace = None if failure is None else (type(failure), failure, failure.__traceback__)
                    logger.handle(
                        logger.makeRecord(logger.name, level, "", 0, message, words, trace, extra={"fields": fields})
                    )
                    del trace
            del failure  # its traceback holds this frame

    def _known_route(self, scope: Scope) -> str:
        """The route that the path names, or nothing."""
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        return path if path in self._paths else ""


def log_refusal(client: tuple[str, int] | None, status: int, error_code: str) -> None:
    """The line of what was answered without ever becoming a request."""
    fields = {"client": client[0] if client else None, "status": status, "error": error_code}
    logger.warning("no request %d", status, extra={"fields": fields})


def _by_name(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers by their names, in lower case; of several of a name the first."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(list(headers))}


def _request_id(headers: Mapping[str, str]) -> str:
    """The caller's, if it can stand in a header and a log line; else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


def _trace_id(headers: Mapping[str, str]) -> str | None:
    """The trace that the caller says the request belongs to."""
    found = _TRACE_PARENT.match(headers.get("traceparent", ""))
    return found[1] if found else None


def _mounted_route(scope: Scope) -> str:
    """Where what matches no route of its own is mounted, if anywhere; nobody can make labels up."""
    route: Any = scope.get("route")
    path = getattr(route, "path", None)
    return path if isinstance(path, str) else "unmatched"


def _level(route: str, status: int, failure: BaseException | None) -> int:
    """Errors of ours are errors; what was refused is a warning; who left, and what went well, is information."""
    if failure is not None or status == 500:
        return logging.ERROR
    if status >= 400 and status != _CLIENT_GONE:
        return logging.WARNING
    return logging.DEBUG if route in _PROBES else logging.INFO


def _fields(scope: Scope, route: str, status: int, bytes_in: int, bytes_out: int) -> dict[str, Any]:
    """What is known of a request, without a byte of its images, its query or its keys."""
    state = scope["state"]
    client = scope.get("client")
    fields: dict[str, Any] = {
        "request_id": state["request_id"],
        "client": client[0] if client else None,
        "method": scope["method"],
        "route": route,
        "status": status,
    }
    if route == "unmatched":
        fields["path"] = scope["path"][:_LONGEST_PATH]
    if (code := state.get("error_code")) is not None:
        fields["error"] = code
    for name in ("images", "images_failed", "batch_size", "priority"):
        if (value := state.get(name)) is not None:
            fields[name] = value
    fields["bytes_in"] = bytes_in
    fields["bytes_out"] = bytes_out
    times: StageTimes | None = state.get("times")
    if times is not None:
        for field, ms in zip(_STAGE_FIELDS, times, strict=True):
            fields[field] = round(ms, 3)
    return fields


def internal_error(request_id: str) -> Response:
    """The answer to a request that met an error nobody foresaw."""
    message = f"an error of the server; its log has it under request id {request_id}"
    content = error_content("internal", message) | {"request_id": request_id}
    return Response(orjson.dumps(content), 500, media_type="application/json")
