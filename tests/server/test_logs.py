import io
import json
import logging
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from server.logs import JsonForm, LogFormat, QueuedHandler, close_log, open_log

logger = logging.getLogger("ddetr.test")
FORGERY = 'x\n2026-01-01T00:00:00.000Z CRITICAL root: forged\r\n{"level":"critical"}\u2028\x1b[2J\x9b2J\x7f'


@contextmanager
def logged(log_format: LogFormat = "json", level: str = "info") -> Iterator[io.StringIO]:
    """What is logged meanwhile; whole when the block has been left."""
    stream = io.StringIO()
    before = logging.getLogger().level
    handler = open_log(level, log_format, stream)
    try:
        yield stream
    finally:
        close_log(handler)
        logging.getLogger().setLevel(before)


def log_failure(message: str, fields: dict[str, Any]) -> None:
    try:
        raise ValueError(FORGERY)
    except ValueError:
        logger.exception(message, extra={"fields": fields})


def test_a_record_is_one_json_object_a_line() -> None:
    with logged() as stream:
        logger.info("%d images", 3, extra={"fields": {"request_id": "abc", "decode_ms": 1.5, "odd": {1: Path("p")}}})
    (line,) = stream.getvalue().splitlines()
    content = json.loads(line)
    time = datetime.fromisoformat(content.pop("time"))
    assert abs((datetime.now(UTC) - time).total_seconds()) < 60
    assert content == {
        "level": "info",
        "logger": "ddetr.test",
        "message": "3 images",
        "request_id": "abc",
        "decode_ms": 1.5,
        "odd": {"1": "p"},
    }


def test_nothing_from_outside_makes_a_line_of_json() -> None:
    with logged() as stream:
        log_failure(FORGERY, {"path": FORGERY, "half a pair": "\ud800"})
    assert stream.getvalue().isascii()
    (line,) = stream.getvalue().splitlines()
    content = json.loads(line)
    assert content["message"] == content["path"] == FORGERY
    assert content["level"] == "error"
    assert content["half a pair"] == "\ud800"
    assert FORGERY in content["traceback"]
    assert "Traceback" in content["traceback"]


def test_nothing_from_outside_makes_a_line_of_text() -> None:
    with logged("text") as stream:
        log_failure(FORGERY, {"path": FORGERY, "plain": "word", "empty": ""})
    first, *rest = stream.getvalue().splitlines()
    assert first[:4].isdigit()
    assert " ERROR ddetr.test: x\\n2026" in first
    assert first.endswith(' plain=word empty=""')
    assert rest
    assert all(line.startswith("  | ") for line in rest)
    assert stream.getvalue().replace("\n", "").isprintable()


def test_text_goes_to_terminals_and_json_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, begin in ((Terminal(), "2"), (io.StringIO(), "{")):
        handler = open_log("info", "auto", stream)
        logger.info("hello")
        close_log(handler)
        assert stream.getvalue().startswith(begin)


def test_only_the_level_asked_for_and_above() -> None:
    with logged(level="warning") as stream:
        logger.info("quiet")
        logger.warning("loud")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["loud"]


def test_warnings_and_what_ends_a_thread_are_logged() -> None:
    def fail() -> None:
        raise LookupError("nobody caught this")

    with logged() as stream:
        thread = threading.Thread(target=fail, name="lost")
        thread.start()
        thread.join()
    content = json.loads(stream.getvalue())
    assert content["message"] == "uncaught in thread lost: LookupError"
    assert "nobody caught this" in content["traceback"]


class Gated(io.StringIO):
    """A reader that takes nothing until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.entered = threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        assert self.gate.wait(30)
        return super().write(text)


@contextmanager
def queued(stream: io.StringIO, most_waiting: int = 10_000) -> Iterator[Callable[[str], None]]:
    handler = QueuedHandler(stream, most_waiting)
    try:
        yield lambda text: handler.handle(logging.makeLogRecord({"msg": text, "levelno": 20, "levelname": "INFO"}))
    finally:
        handler.close()


def test_a_reader_that_is_stuck_holds_nobody_up_and_gets_every_line_in_order() -> None:
    stream = Gated()
    with queued(stream) as log:
        log("0")
        assert stream.entered.wait(30)
        for index in range(1, 2000):
            log(str(index))  # would hang if it waited for the reader
        stream.gate.set()
    assert stream.getvalue().split() == [str(index) for index in range(2000)]


def test_an_error_waits_for_no_other_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.written: queue.SimpleQueue[str] = queue.SimpleQueue()

        def write(self, text: str) -> int:
            self.written.put(text)
            return super().write(text)

    monkeypatch.setattr("server.logs._GATHER_S", 1000.0)
    stream = Stream()
    handler = QueuedHandler(stream)
    handler.handle(logging.makeLogRecord({"msg": "first", "levelno": logging.INFO}))
    assert stream.written.get(timeout=30) == "first\n"
    handler.handle(logging.makeLogRecord({"msg": "gathers", "levelno": logging.WARNING}))
    with pytest.raises(queue.Empty):
        stream.written.get(timeout=0.1)
    handler.handle(logging.makeLogRecord({"msg": "hurries", "levelno": logging.ERROR}))
    assert stream.written.get(timeout=30) == "gathers\nhurries\n"
    handler.close()


def test_a_backlog_is_written_without_gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.logs._GATHER_S", 1000.0)
    stream = Gated()
    with queued(stream) as log:
        for index in range(2000):
            log(str(index))
        stream.gate.set()
    assert stream.getvalue().split() == [str(index) for index in range(2000)]


def test_lines_with_fields_and_without_stay_in_order() -> None:
    stream = Gated()
    handler = QueuedHandler(stream)
    handler.setFormatter(JsonForm())
    for index in range(2000):
        fields = {"fields": {"index": index}} if index % 3 else {}
        handler.handle(logging.makeLogRecord({"levelno": 20, "msg": "%d", "args": (index,), **fields}))
    stream.gate.set()
    handler.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in lines] == [str(index) for index in range(2000)]
    assert all(line.get("index", 0) == (index if index % 3 else 0) for index, line in enumerate(lines))


def test_a_line_says_what_was_when_it_was_logged() -> None:
    stream, people = Gated(), ["Ann"]
    handler = QueuedHandler(stream)
    handler.handle(logging.makeLogRecord({"levelno": 20, "msg": "%s", "args": (people,)}))
    people.append("Bob")
    stream.gate.set()
    handler.close()
    assert stream.getvalue() == "['Ann']\n"


def test_an_error_is_formed_at_once_and_so_is_what_comes_behind_many() -> None:
    class Fields(dict[str, int]):
        """Fields that know whether their record is held."""

    stream = Gated()
    handler = QueuedHandler(stream)
    handler.setFormatter(JsonForm())
    handler.handle(logging.makeLogRecord({"levelno": 20, "msg": "first"}))
    assert stream.entered.wait(30)  # from here on all lines wait
    held = []
    for index in range(700):
        fields = Fields(index=index)
        error = (ValueError, ValueError("x"), None) if index == 0 else None
        handler.handle(logging.makeLogRecord({"levelno": 20, "msg": "y", "fields": fields, "exc_info": error}))
        held.append(weakref.ref(fields))
        del fields
    assert [index for index, each in enumerate(held) if each() is not None] == list(range(1, 500))
    stream.gate.set()
    handler.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()[1:]]
    assert [line["index"] for line in lines] == list(range(700))
    assert "ValueError: x" in lines[0]["traceback"]


def test_a_line_that_cannot_be_formed_costs_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    handler = QueuedHandler(stream)
    for fields in ({}, {"fields": {"a": 1}}):
        handler.handle(logging.makeLogRecord({"levelno": 20, "msg": "%d", "args": ("no number",), **fields}))
        handler.handle(logging.makeLogRecord({"levelno": 20, "msg": "well", **fields}))
    handler.close()
    assert stream.getvalue() == "well\nwell\n"
    assert capsys.readouterr().err.count("TypeError") == 2


def test_a_reader_that_stays_stuck_costs_lines_not_memory_and_is_told() -> None:
    stream = Gated()
    with queued(stream, most_waiting=10) as log:
        log("0")
        assert stream.entered.wait(30)
        for index in range(1, 31):
            log(str(index))
        stream.gate.set()
    lines = stream.getvalue().splitlines()
    assert lines[:11] == [str(index) for index in range(11)]
    assert lines[11:] == ["20 lines of the log were lost before this one"]


def test_a_reader_that_has_gone_ends_nothing() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with queued(Gone()) as log:
        log("nobody hears this")


@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "raise RuntimeError('the end')"])
def test_a_process_that_ends_has_written_all(ending: str) -> None:
    code = f"""
import logging, sys
from server.logs import open_log
open_log("info", "json")
for index in range(5000):
    logging.info("%d", index)
{ending}
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, timeout=60, check=False
    )
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert [line["message"] for line in lines[:5000]] == [str(index) for index in range(5000)]
    assert len(lines) == 5000 + ("the end" in ending)
    if "the end" in ending:
        assert (lines[-1]["level"], "the end" in lines[-1]["traceback"]) == ("critical", True)


def test_a_reader_that_never_takes_anything_does_not_keep_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.logs._PATIENCE_S", 0.05)
    stream = Gated()
    with queued(stream) as log:
        log("0")
        assert stream.entered.wait(30)
    assert stream.getvalue() == ""
    stream.gate.set()  # lets the thread go
