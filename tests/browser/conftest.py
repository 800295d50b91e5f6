"""A real Chromium, and a server in this process for it to look at. Skipped where there is no Chromium on PATH."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from server.app import create_app
from server.settings import Settings
from tests.browser.visit import PLACES, Visit, serving
from tests.server.fake_engine import FakeEngine
from tests.server.pictures import HEIGHT, WIDTH

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")  # not the session: while it lives, no asyncio.run works in this thread
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs chromium, chromium-browser or google-chrome on PATH: apt-get install chromium")
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'ddetr[dev]'")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.gate.set()


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[str]:
    """The address of a server that finds what is bright."""
    with serving(create_app(Settings(bundle=Path("no-bundle"), decode_threads=1), engine)) as url:
        yield url


@pytest.fixture
def visit(browser: Browser, server: str) -> Iterator[Callable[..., Visit]]:
    """Opens the page in a context of its own, with Playwright's options for one.

    At the end of the test: no page asked another host, broke its policy, or left an error on its console.
    """
    visits: list[Visit] = []
    with ExitStack() as open_contexts:

        def open_page(url: str = server, **options: object) -> Visit:
            context = browser.new_context(**options)
            open_contexts.callback(context.close)
            context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url.rstrip("/"))
            visits.append(Visit(context.new_page(), url))
            return visits[-1]

        yield open_page
        for each in visits:
            assert not [url for url in each.requests if not url.startswith((each.url, "blob:", "data:"))]
            assert each.page.evaluate("window.violations") == []
            # Chromium itself notes every answer that is an error; the page must add none.
            assert not [text for text in each.complaints if not text.startswith("Failed to load resource")]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A red, a green and a blue rectangle."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for channel, (x0, y0, x1, y1) in enumerate(PLACES.values()):
        pixels[y0:y1, x0:x1, channel] = 255
    path = tmp_path / "three.png"
    Image.fromarray(pixels).save(path)
    return path
