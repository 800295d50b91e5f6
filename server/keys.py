"""API keys: who may ask for anything but this process's health. From the settings, and from a file that may change."""

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import AdminDisabled, ServiceError, StartupError, Unauthorized

logger = logging.getLogger("ddetr.keys")

OPEN_PATHS = frozenset({"/livez", "/readyz"})
PAGES = frozenset({"/", "/sample.jpg", "/docs"})  # the same in every installation, without data
PAGES_FOLDER = "/static-offline-docs/"  # the scripts of /docs
ADMIN_FOLDER = "/admin/"  # has keys of its own, and is closed without them

_CHECK_EVERY_S = 1.0
_MOST_BYTES = 1 << 20


class ApiKeys:
    """The keys in force. Keeps their SHA-256 only, so that no dump, log or error can show one.

    Raises StartupError if `file` cannot be read now; later such a file leaves the keys as they are.
    """

    def __init__(
        self, keys: Sequence[SecretStr] = (), file: Path | None = None, asker: str = "this server needs an API key"
    ) -> None:
        self._asker = asker
        self._fixed = _digests(key.get_secret_value() for key in keys)
        self._file = file
        self._digests = self._fixed
        self._seen: object = None
        if file is not None:
            self._seen = _state(file)
            try:
                self._digests += _read(file)
            except (OSError, ValueError) as error:
                raise StartupError(f"api_keys_file {file}: {_reason(error)}") from None

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._digests)

    def check(self, headers: Mapping[str, str], basic: bool = True) -> None:
        """Raise Unauthorized unless `Authorization: Bearer KEY`, `X-API-Key: KEY` or Basic's password is a key."""
        if not self._digests:
            return
        sent = hashlib.sha256(_given(headers, basic)).digest()
        # Every key is compared, each in constant time: how long it takes tells nothing of which was near.
        matches = [hmac.compare_digest(sent, digest) for digest in self._digests]
        if not any(matches):
            raise Unauthorized(f"{self._asker}: Authorization: Bearer KEY")

    def refresh(self) -> None:
        """Read the file again if it has changed. If it cannot be read, or holds no key, say so and change nothing."""
        if self._file is None or (state := _state(self._file)) == self._seen:
            return
        self._seen = state  # of before it is read: what is written meanwhile is found by the next look
        try:
            digests = _read(self._file)
        except (OSError, ValueError) as error:
            logger.error("api_keys_file %s: %s; the keys stay as they were", self._file, _reason(error))
            return
        self._digests = self._fixed + digests
        logger.info("api_keys_file %s: %d keys", self._file, len(digests))

    async def watch(self) -> None:
        """Keep an eye on the file until cancelled, beside the loop: a file system may hang."""
        while self._file is not None:
            await asyncio.sleep(_CHECK_EVERY_S)
            try:
                await asyncio.to_thread(self.refresh)
            except Exception:  # no thread to be had, for one; unwatched, a key that was taken back would stay good
                logger.exception("api_keys_file %s could not be looked at", self._file)


class Gate:
    """ASGI middleware within `Observe`: without a key nobody gets past it, but to OPEN_PATHS.

    What it does not know is closed, too.

    A browser that asks for a page is told to ask its user for the key, unless the pages are open: those ask themselves.
    Nobody gets to ADMIN_FOLDER without an admin key, which is all that is asked for there.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        admin_keys: ApiKeys,
        refuse: Callable[[Request, ServiceError], Awaitable[Response]],
        open_pages: bool = False,
    ) -> None:
        self._app = app
        self._keys = keys
        self._admin_keys = admin_keys
        self._refuse = refuse
        self._open_pages = open_pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            try:
                self._check(path, scope["state"]["headers"])
            except (Unauthorized, AdminDisabled) as error:
                response = await self._refuse(Request(scope), error)
                if _is_page(path):
                    response.headers["WWW-Authenticate"] = 'Basic realm="API key as password", charset="UTF-8"'
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Mapping[str, str]) -> None:
        if path.startswith(ADMIN_FOLDER):
            if not self._admin_keys.required:
                raise AdminDisabled(f"{ADMIN_FOLDER} is closed: set admin_keys (DDETR_ADMIN_KEYS) to open it")
            self._admin_keys.check(headers, basic=False)  # what a browser adds by itself another site could use
        elif path not in OPEN_PATHS and not (self._open_pages and _is_page(path)):
            self._keys.check(headers)


def _is_page(path: str) -> bool:
    return path in PAGES or path.startswith(PAGES_FOLDER)


def _given(headers: Mapping[str, str], basic: bool) -> bytes:
    """The key that came along, or nothing. Headers were read as Latin-1; this gives their bytes back."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic" and "x-api-key" not in headers:  # what a browser sends with all it asks for
        if not basic or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return b""
        try:
            return base64.b64decode(token.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return given.encode("latin-1")


def _read(file: Path) -> tuple[bytes, ...]:
    """The digests of a file of one key a line; blank lines and words from a # on are comments.

    Raises OSError, or ValueError, which shows no key.
    """
    with file.open("rb") as opened:
        content = opened.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES} bytes")
    keys = []
    for number, line in enumerate(content.decode("utf-8-sig").splitlines(), 1):
        words = [*takewhile(lambda word: not word.startswith("#"), line.split())]
        if len(words) > 1:
            raise ValueError(f"line {number} holds {len(words)} words: one key a line, and nothing beside it")
        if words and not (words[0].isascii() and words[0].isprintable()):
            raise ValueError(f"line {number}: a key has characters that no header can carry")
        keys += words
    if not keys:
        raise ValueError("no key in it")
    return _digests(keys)


def _digests(keys: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys if key)


def _state(file: Path) -> object:
    """What differs when the file does, another of its name included."""
    try:
        status = os.stat(file)
    except OSError as error:
        return error.errno
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _reason(error: Exception) -> str:
    """What is wrong, without what was in the file."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
