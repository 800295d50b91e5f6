"""Log lines: JSON or text, one a record, written beside the event loop.

What a record means to say beyond its message stands in `extra={"fields": {...}}`. Nothing that comes from outside can
begin a line, in either form, or end one.
"""

import json
import logging
import re
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Literal, TextIO

import orjson

LogFormat = Literal["auto", "json", "text"]

# Lines that wait for a slow reader of the log: some 20 MB. What comes after them is counted, not kept.
_MOST_WAITING = 50_000
_MOST_AT_ONCE = 500
_MOST_UNFORMED = 500
_WORD = re.compile(r"[\w.,:;/@%+*()<>\[\]{}~!?#'|&-]+", re.ASCII)
# A reader that takes nothing for so long at the end has gone.
_PATIENCE_S = 5.0

logger = logging.getLogger("ddetr.logs")

_GATHER_S = 0.25
"""After a write lines gather this long for the next: to wake a thread for each costs more than to write it."""


class JsonForm(logging.Formatter):
    """A record as a JSON object of ASCII characters: time, level, logger, message, its fields, its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its end."""
        content: dict[str, Any] = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        content.update(_fields(record))
        if trace := _traceback(self, record):
            content["traceback"] = trace
        try:
            line = orjson.dumps(content, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
        except orjson.JSONEncodeError:  # half a surrogate pair, as file names can have
            line = ""
        # What is not ASCII could be taken for the end of a line, too (U+2028), or for an order to a terminal (U+009B).
        return line if line.isascii() and line else json.dumps(content, default=str)


class TextForm(logging.Formatter):
    """A record as a person reads it; a traceback's lines follow it, indented."""

    def format(self, record: logging.LogRecord) -> str:
        """One line and its traceback's, without the end of the last."""
        head = f"{_timestamp(record.created)} {record.levelname} {record.name}: {_printable(record.getMessage())}"
        pairs = [f"{name}={_word(value)}" for name, value in _fields(record).items()]
        lines = ["  ".join([head, " ".join(pairs)]) if pairs else head]
        lines += ["  | " + _printable(line) for line in _traceback(self, record).split("\n") if line]
        return "\n".join(lines)


class QueuedHandler(logging.Handler):
    """Hands lines to a thread that writes them to `stream`, so that a slow reader of the log holds nobody up.

    `close`, which `logging` also calls when the process exits, returns when all are written.
    """

    def __init__(self, stream: TextIO, most_waiting: int = _MOST_WAITING) -> None:
        super().__init__()
        self._stream = stream
        self._most_waiting = most_waiting
        # Queues, whose `put` may interrupt itself, as a signal's handler that logs does.
        self._lines: SimpleQueue[str | logging.LogRecord | None] = SimpleQueue()
        self._lost = 0
        self._written = 0
        self._closing = False
        self._hurry: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Form the line here, where what it tells of still is as it was, and hand it over.

        A record with fields, which are made for it alone, is formed later with others: that takes half the time. But
        not one with an error, which holds frames and what is in them, and none where many lines wait: it is larger.
        """
        waiting = self._lines.qsize()
        if waiting >= self._most_waiting or self._closing:
            self._lost += 1
        elif waiting < _MOST_UNFORMED and _fields(record) and not record.exc_info:
            self._lines.put(record)
        elif (line := self._form(record)) is not None:
            self._lines.put(line)
        if record.levelno >= logging.ERROR and self._hurry.empty():  # the process may not live to gather more
            self._hurry.put(None)

    def _form(self, record: logging.LogRecord) -> str | None:
        try:
            return self.format(record)
        except Exception:
            self.handleError(record)
            return None

    def close(self) -> None:
        """Write what waits, and stop. Gives up on a reader that takes nothing for some seconds."""
        self.acquire()  # as `handle` does around `emit`: no line may come after the last
        try:
            closing, self._closing = self._closing, True
            if not closing:
                self._lines.put(None)
                self._hurry.put(None)
        finally:
            self.release()
        written = -1
        while self._thread.is_alive() and written != self._written:
            written = self._written
            self._thread.join(_PATIENCE_S)
        super().close()

    def _write(self) -> None:
        while True:
            lines = [self._lines.get()]
            try:
                while len(lines) < _MOST_AT_ONCE and lines[-1] is not None:
                    lines.append(self._lines.get_nowait())
            except Empty:
                pass
            formed = [self._form(line) if isinstance(line, logging.LogRecord) else line for line in lines]
            texts = [line for line in formed if line is not None]
            if self._lost:
                message = f"{self._lost} lines of the log were lost before this one"
                self._lost = 0
                texts.append(self.format(logging.LogRecord(logger.name, logging.WARNING, "", 0, message, None, None)))
            if texts:
                try:
                    self._stream.write("\n".join(texts) + "\n")
                    self._stream.flush()
                except (OSError, ValueError):  # nobody reads, or the stream is closed: there is none to tell
                    pass
                self._written += len(texts)
            if lines[-1] is None:
                return
            if len(lines) < _MOST_AT_ONCE:
                with suppress(Empty):
                    self._hurry.get(timeout=_GATHER_S)


def open_log(level: str, log_format: LogFormat = "auto", stream: TextIO | None = None) -> QueuedHandler:
    """Send every logger's records of `level` or above to `stream` (standard error), until the handler is closed.

    `auto` is text where a terminal shows them, else JSON. What ends a thread or the process uncaught is logged, too.
    """
    stream = stream or sys.stderr
    handler = QueuedHandler(stream)
    as_text = stream.isatty() if log_format == "auto" else log_format == "text"
    handler.setFormatter(TextForm() if as_text else JsonForm())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    return handler


def close_log(handler: QueuedHandler) -> None:
    """Undo `open_log`, with every line written."""
    logging.getLogger().removeHandler(handler)
    handler.close()
    logging.captureWarnings(False)
    sys.excepthook, threading.excepthook = sys.__excepthook__, threading.__excepthook__


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logger.critical("uncaught: %s", kind.__name__, exc_info=(kind, error, trace))


def _log_uncaught_in_thread(ended: threading.ExceptHookArgs) -> None:
    if not issubclass(ended.exc_type, SystemExit) and ended.exc_value is not None:
        name = ended.thread.name if ended.thread else "?"
        trace = (ended.exc_type, ended.exc_value, ended.exc_traceback)
        logger.error("uncaught in thread %s: %s", name, ended.exc_type.__name__, exc_info=trace)


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, dict) else {}


def _traceback(form: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [form.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts)


def _timestamp(created_s: float) -> str:
    return datetime.fromtimestamp(created_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _printable(text: str) -> str:
    """`text` with what is no character to see (line ends, orders to a terminal) as its escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def _word(value: object) -> str:
    """`value` as one word; in quotes, as JSON, if it is none by itself."""
    text = str(value)
    return text if _WORD.fullmatch(text) else json.dumps(text)
