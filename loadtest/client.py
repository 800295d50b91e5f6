"""Requests to /detect over kept connections, and what became of each."""

import io
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

import aiohttp
import orjson

from loadtest.payload import Payload

OK = "ok"
TIMEOUT = "timeout"
REFUSED = "connection refused"
DISCONNECTED = "disconnected"

# uvicorn closes a connection that idles for 5 s; a request sent in that moment would be lost.
_KEEPALIVE_S = 4.0
_PATIENCE_S = 60.0
_MARGIN_S = 5.0  # past the deadline that the server was told, for its answer
_SCRAPE_TIMEOUT_S = 10.0
# aiohttp warns of larger bodies in one piece.
_ONE_PIECE_BYTES = 2**20


@dataclass(frozen=True)
class Target:
    """The server under test."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    metrics_url: str | None = None  # default: /metrics of `url`
    pid: int | None = None  # of a server on this machine whose CPU time is to be read


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one try."""

    outcome: str  # OK, "429 queue_full", TIMEOUT, ...
    retry_after_s: float | None = None
    stages_ms: Mapping[str, float] | None = None


class Client:
    """A pool of at most `connections` connections. Use as an async context."""

    def __init__(
        self,
        target: Target,
        connections: int,
        timeout_ms: float | None = None,
        priority: Literal["interactive", "batch"] | None = None,
    ) -> None:
        self._url = f"{target.url}/detect"
        self._metrics_url = target.metrics_url or f"{target.url}/metrics"
        self._connections = connections
        self._patience = aiohttp.ClientTimeout(
            total=_PATIENCE_S if timeout_ms is None else timeout_ms / 1e3 + _MARGIN_S
        )
        self._headers: dict[str, str] = {}
        if target.api_key is not None:
            self._headers["Authorization"] = f"Bearer {target.api_key}"
        self._detect_headers: dict[str, str] = {}
        if timeout_ms is not None:
            self._detect_headers["X-Timeout-Ms"] = f"{timeout_ms:g}"
        if priority is not None:
            self._detect_headers["X-Priority"] = priority

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=_KEEPALIVE_S)
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=self._patience,
            headers=self._headers,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def detect(self, payload: Payload) -> Answer:
        """Send one picture and read the answer to its end. What goes wrong is in the answer, too."""
        body = payload.body if len(payload.body) < _ONE_PIECE_BYTES else io.BytesIO(payload.body)
        headers = {"Content-Type": payload.media_type, **self._detect_headers}
        try:
            async with self._session.post(self._url, data=body, headers=headers) as response:
                content = await response.read()
        except TimeoutError:
            return Answer(TIMEOUT)
        except (aiohttp.ClientConnectorError, ssl.SSLError) as error:
            cause = getattr(error, "os_error", error)
            return Answer(REFUSED if isinstance(cause, ConnectionRefusedError) else f"connection: {cause}")
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError, aiohttp.ClientOSError):
            return Answer(DISCONNECTED)
        except aiohttp.ClientError as error:
            return Answer(type(error).__name__)
        if response.status == 200:
            return Answer(OK, stages_ms=server_timing(response.headers.get("Server-Timing", "")))
        return Answer(
            f"{response.status} {error_code(content)}".rstrip(), _seconds(response.headers.get("Retry-After"))
        )

    async def metrics(self) -> str | None:
        """The server's metrics; None where it gives none."""
        try:
            # A session of its own: the load's connections may all be taken.
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_SCRAPE_TIMEOUT_S)) as session,
                session.get(self._metrics_url, headers=self._headers) as response,
            ):
                return await response.text() if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None


def server_timing(header: str) -> dict[str, float]:
    """Milliseconds by stage of a Server-Timing header; entries without a duration are left out."""
    stages = {}
    for entry in header.split(","):
        name, *parameters = entry.split(";")
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip() == "dur":
                try:
                    stages[name.strip()] = float(value)
                except ValueError:
                    continue
    return stages


def error_code(content: bytes) -> str:
    """`code` of an error answer of this server's form; empty where it has another."""
    try:
        code = orjson.loads(content)["error"]["code"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""
    return code if isinstance(code, str) else ""


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After in seconds; its other form, a date, is for proxies."""
    try:
        return None if retry_after is None else max(0.0, float(retry_after))
    except ValueError:
        return None
