"""A server to visit, and a visit to its page that remembers what the page asked for and complained about."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from tests.server.pictures import BOX

if TYPE_CHECKING:
    from playwright.sync_api import Page

# Of the picture in conftest. The fake engine gives 0.9, 0.6 and 0.2; the page's slider begins at 0.5.
PLACES = {"red": BOX, "green": (64, 36, 92, 60), "blue": (4, 40, 20, 56)}
ALL_THREE = "0.15"

START_TIMEOUT_S = 20.0
PATIENCE_MS = 20_000  # a slow machine's; nothing waits for it that goes well

# Runs before the page's own scripts.
REMEMBER_VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""


class Visit:
    """A page of the server at `url`."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        page.add_init_script(REMEMBER_VIOLATIONS)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        page.goto(url)
        self.settle()

    def settle(self) -> None:
        """Wait until the page knows the model, or asks for a key."""
        self.page.locator("#model:not([hidden]), #key-form:not([hidden])").first.wait_for()

    def detections_asked(self) -> int:
        """How many requests for detections there were."""
        return sum("/detect?" in url for url in self.requests)

    def choose(self, path: Path) -> None:
        """Choose a file as with the button."""
        self.page.locator("#file").set_input_files(path)

    def set_threshold(self, value: str) -> None:
        """Move the slider, and wait until the page has followed."""
        self.page.locator("#threshold").fill(value)
        self.page.locator("#threshold-shown", has_text=f"{float(value):.2f}").wait_for()

    def summary(self) -> str:
        """What the page says it found, once it has an answer."""
        self.page.locator('body[data-state="done"]').wait_for()
        return self.page.locator("#summary").inner_text()

    def problem(self) -> str:
        """What the page says went wrong, once it does."""
        self.page.locator("#problem").wait_for()
        return self.page.locator("#problem").inner_text()

    def labels(self) -> list[str]:
        """The classes in the table, from the top."""
        return [row[0] for row in self.rows()]

    def rows(self) -> list[list[str]]:
        """The table's cells."""
        return [row.locator("td").all_inner_texts() for row in self.page.locator("#rows tr").all()]

    def focused(self) -> str:
        """The id or, without one, the text of what has the focus."""
        focused: str = self.page.evaluate("document.activeElement.id || document.activeElement.innerText")
        return focused

    def tab_to(self, goal: str, most: int = 40) -> None:
        """Press Tab until what has this id, or text, has the focus."""
        for _ in range(most):
            self.page.keyboard.press("Tab")
            if self.focused() == goal:
                return
        raise AssertionError(f"Tab does not lead to {goal!r}; it ended at {self.focused()!r}")

    def overlay_sum(self) -> int:
        """A figure that changes with what is painted over the picture."""
        total: int = self.page.evaluate(
            """() => {
                const canvas = document.getElementById("overlay"), pen = canvas.getContext("2d");
                const bytes = pen.getImageData(0, 0, canvas.width, canvas.height).data;
                return bytes.reduce((sum, byte) => (sum * 31 + byte) % 1000003, 7);
            }"""
        )
        return total


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app on a free port of this machine, in a thread; yields its address."""
    runner = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, lifespan="on", log_config=None, ws="none"))
    thread = threading.Thread(target=runner.run, name="server")
    thread.start()
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not runner.started:
            if not thread.is_alive() or time.monotonic() > deadline_s:
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        runner.should_exit = True
        thread.join(timeout=START_TIMEOUT_S)
